"""Sizes of an engine on a CPU: prompt tokens per step, and the KV cache."""

from typing import Final

from app.core.machine import available_memory

PROMPT_TOKENS_PER_STEP: Final = 256
"""Most prompt tokens in a step beside the running requests; ADR 14 has the measurements."""

# Tokens of cache for each running request. If all are longer, some wait and are computed again.
TOKENS_PER_REQUEST = 1024
# Largest share of the free memory for the cache. The rest is for the steps and other processes.
_SHARE = 0.4


def cache_tokens(*, context_length: int, max_running: int, bytes_per_token: float) -> int:
    """Size of the KV cache in tokens.

    At least one whole context, because an admitted request must be able to finish.

    Args:
        context_length: Most tokens of one request.
        max_running: Most requests in a batch.
        bytes_per_token: Size of one token in the cache, over all layers.
    """
    affordable = int(available_memory() * _SHARE / bytes_per_token)
    wanted = max_running * min(context_length, TOKENS_PER_REQUEST)
    return max(context_length, min(wanted, affordable))
