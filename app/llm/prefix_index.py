"""Which prefixes of earlier requests are known, in blocks of tokens.

The index mirrors a KV cache that shares whole blocks by their content and evicts the least recently
used ones. It gets the same tokens as the cache, so it can predict the cache's hits.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

BLOCK_SIZE: Final = 32
"""Tokens in a block, as in the KV cache of OpenVINO's CPU plugin."""


class PrefixIndex:
    """The blocks of :data:`BLOCK_SIZE` tokens in a cache of ``capacity`` blocks.

    By default these are two million tokens, for which the index takes some 6 MB. The blocks of
    each ``owner`` are found by that owner alone.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def find(self, prompt: Sequence[int], owner: str = "") -> int:
        """How many leading tokens of ``prompt`` are in the cache; never the last one."""
        found = 0
        for key in self._keys(prompt, owner):
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            found += BLOCK_SIZE
        return min(found, len(prompt) - 1)

    def add(self, tokens: Sequence[int], owner: str = "") -> None:
        """Add the blocks of ``tokens``: a prompt, or a prompt and its answer."""
        for key in self._keys(tokens, owner):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)

    def _keys(self, tokens: Sequence[int], owner: str) -> Iterator[int]:
        """A key for each whole block, which depends on all tokens up to the block's end."""
        key = hash(owner)
        for start in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
            key = hash((key, *tokens[start : start + BLOCK_SIZE]))
            yield key
