"""Which requests may not be in the pipeline together.

The library also finds a prompt's beginning in its KV cache where that ends within a block. All
prompts that go on from there then write into that one block, each its own tokens, and their answers
are wrong. A prompt therefore waits while another has such a block in use, unless both are equal.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from app.llm.prefix_index import BLOCK_SIZE

_SEED: Final = 0


@dataclass(eq=False)
class Writer:
    """A request that the pipeline has, or shall get.

    Attributes:
        prompt: Token ids.
        key: Of the prompt and the answer so far.
        begins: The beginnings of these that the cache may have, and that end within a block: a key
            for each, and where that block ends, in tokens.
        length: Tokens of the prompt and the answer; 0 before the answer's first token.
    """

    prompt: Sequence[int]
    key: int
    begins: dict[int, int]
    length: int = 0


class SharedBlocks:
    """Knows the beginnings that end within a block of the cache.

    Args:
        capacity: Blocks of the cache; as many beginnings are kept.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: OrderedDict[int, None] = OrderedDict()

    def writer(self, prompt: Sequence[int]) -> Writer:
        """A request's entry; from now on its whole prompt is a beginning too."""
        keys = list(accumulate(prompt, _key, initial=_SEED))
        if len(prompt) % BLOCK_SIZE:
            self._keep(keys[-1])
        begins = {
            key: _end(length)
            for length, key in enumerate(keys)
            if key in self._known and length % BLOCK_SIZE
        }
        return Writer(prompt, keys[-1], begins)

    def grew(self, writer: Writer, tokens: Sequence[int]) -> None:
        """Take note of new tokens of an answer.

        The library names a block by its first token when it begins it, while the answer goes on.
        """
        writer.length = writer.length or len(writer.prompt)
        for token in tokens:
            writer.key = _key(writer.key, token)
            writer.length += 1
            if writer.length % BLOCK_SIZE == 1:
                self._keep(writer.key)
                writer.begins[writer.key] = _end(writer.length)

    def _keep(self, key: int) -> None:
        self._known[key] = None
        self._known.move_to_end(key)
        if len(self._known) > self._capacity:
            self._known.popitem(last=False)


def exclude(one: Writer, other: Writer) -> bool:
    """Whether ``one`` has to wait until ``other`` has left the block that both begin with."""
    if one.prompt == other.prompt:
        # The library copies the block before it writes answers.
        return False
    return any(other.length <= one.begins[key] for key in one.begins.keys() & other.begins.keys())


def _key(before: int, token: int) -> int:
    return hash((before, token))


def _end(length: int) -> int:
    """Where the block ends in which a text of this length ends."""
    return -(-length // BLOCK_SIZE) * BLOCK_SIZE
