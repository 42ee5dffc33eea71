"""Sizes of an engine on a CPU: prompt tokens per step, and the KV cache."""

from typing import Final

from app.core.machine import available_memory
from app.utils.errors import ModelLoadError

PROMPT_TOKENS_PER_STEP: Final = 256
"""Most prompt tokens in a step beside the running requests; ADR 14 has the measurements."""

# Tokens of cache for each running request. If all are longer, some wait and are computed again.
TOKENS_PER_REQUEST = 1024
# Largest share of the free memory for the cache. The rest is for the steps and other processes.
_SHARE = 0.4
# Pages of the cache take memory when they are first used, so a context that never becomes full may
# exceed the memory, but not by so much.
_MOST_OVER = 16


def cache_tokens(*, context_length: int, max_running: int, bytes_per_token: float) -> int:
    """Size of the KV cache in tokens.

    At least one whole context, because an admitted request must be able to finish.

    Args:
        context_length: Most tokens of one request.
        max_running: Most requests in a batch.
        bytes_per_token: Size of one token in the cache, over all layers.

    Raises:
        ModelLoadError: Memory has no room for a small part of one context.
    """
    memory = available_memory()
    if context_length * bytes_per_token > memory * _MOST_OVER:
        raise ModelLoadError(
            f"a context of {context_length} tokens takes {context_length * bytes_per_token:.1e} "
            f"bytes, and {memory:.1e} are free: choose a model with a shorter context"
        )
    affordable = int(memory * _SHARE / bytes_per_token)
    wanted = max_running * min(context_length, TOKENS_PER_REQUEST)
    return max(context_length, min(wanted, affordable))
