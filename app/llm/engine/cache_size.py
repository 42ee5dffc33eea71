"""Sizes of an engine on a CPU: prompt tokens per step, layers in integers, and the KV cache."""

from collections.abc import Callable
from typing import Final

from app.core.machine import available_memory
from app.utils.errors import ModelLoadError

PROMPT_TOKENS_PER_STEP: Final = 256
"""Most prompt tokens in a step beside the running requests; ADR 14 has the measurements."""

ROWS_OF_INTEGERS: Final = 64
"""Rows that integer layers multiply in one call, and tokens of a step; ADR 12 has the costs."""

WORTH_QUANTIZING: Final = 1 << 20
"""A layer with fewer weights stays float32, which is as fast; ADR 12 has the costs."""

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
    memory = _memory_for(context_length, context_length * bytes_per_token)
    affordable = int(memory * _SHARE / bytes_per_token)
    wanted = max_running * min(context_length, TOKENS_PER_REQUEST)
    return max(context_length, min(wanted, affordable))


def cache_bytes(
    size: Callable[[int], float], *, context_length: int, max_running: int, memory: float | None
) -> float:
    """Size of separate caches together in bytes, at least that of one whole context.

    Args:
        size: Bytes of a cache of so many tokens.
        context_length: Most tokens of one request.
        max_running: Most requests at once.
        memory: Bytes for the caches; ``None`` is a share of what is free on a CPU.

    Raises:
        ModelLoadError: As :func:`cache_tokens`, on a CPU.
    """
    whole = size(context_length)
    if memory is None:
        memory = _memory_for(context_length, whole) * _SHARE
    wanted = max_running * size(min(context_length, TOKENS_PER_REQUEST))
    return max(whole, min(wanted, memory))


def _memory_for(context_length: int, size: float) -> int:
    """Free memory in bytes, where it has room for a part of a context."""
    memory = available_memory()
    if size > memory * _MOST_OVER:
        raise ModelLoadError(
            f"a context of {context_length} tokens takes {size:.1e} bytes, and {memory:.1e} are "
            "free: choose a model with a shorter context"
        )
    return memory
