"""Sizes of an engine on a CPU: what a step takes in, and how large the KV cache is.

The cache takes the memory that everything else needs, so it is not simply as large as can be.
"""

from typing import Final

from app.llm.engine.resources import available_memory

PROMPT_TOKENS_PER_STEP: Final = 256
"""Prompt tokens that a step takes in beside the running requests.

Longer prompts come in pieces, so that they do not stall the running streams. Half of it makes a
prompt a tenth to a seventh slower, twice of it nearly doubles the streams' longest gap.
"""

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
