"""Which prefixes of earlier requests a KV cache still holds, for backends that do not say.

A mirror of a cache that shares whole blocks by their content and overwrites the least recently
used ones. It is told what the cache is told, so that it can be asked what the cache will find.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

BLOCK_SIZE: Final = 32
"""Tokens in a block of the KV cache of OpenVINO's CPU plugin."""


class PrefixIndex:
    """The blocks of :data:`BLOCK_SIZE` tokens that a cache holds."""

    def __init__(self, capacity: int) -> None:
        """Make an empty index.

        Args:
            capacity: Most blocks the cache holds.
        """
        self._capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def find(self, prompt: Sequence[int]) -> int:
        """How many leading tokens of ``prompt`` need not be computed; the last one always is."""
        found = 0
        for key in self._keys(prompt):
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            found += BLOCK_SIZE
        return min(found, len(prompt) - 1)

    def add(self, tokens: Sequence[int]) -> None:
        """Note that the cache now holds ``tokens``, a prompt or a prompt and its answer."""
        for key in self._keys(tokens):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)

    def _keys(self, tokens: Sequence[int]) -> Iterator[int]:
        """One key for each whole block; it depends on everything before the block, too."""
        key = 0
        for start in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
            key = hash((key, *tokens[start : start + BLOCK_SIZE]))
            yield key
