"""How large the KV cache is, on a CPU, where it takes the memory that everything else needs."""

from app.llm.engine.cores import available_memory

# Tokens of cache planned for each running request. A few longer requests are fine; if all are,
# some wait and are computed again.
TOKENS_PER_REQUEST = 1024
# Share of the memory that is free after loading which the cache may take.
_SHARE = 0.4


def cache_tokens(*, context_length: int, max_running: int, bytes_per_token: float) -> int:
    """Tokens for which to make room.

    One whole context is the least, since a request that was admitted must be able to finish.

    Args:
        context_length: Most tokens of one request.
        max_running: Requests generated at once.
        bytes_per_token: What the cache takes for one token, over all layers.
    """
    affordable = int(available_memory() * _SHARE / bytes_per_token)
    wanted = max_running * min(context_length, TOKENS_PER_REQUEST)
    return max(context_length, min(wanted, affordable))
