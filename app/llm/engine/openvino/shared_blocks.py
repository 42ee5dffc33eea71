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
        begins: The beginnings of the prompt that the cache may have, and that end within a block: a
            key for each, and where that block ends, in tokens.
        length: Tokens of the prompt and the answer; 0 before the answer's first token.
    """

    prompt: Sequence[int]
    begins: dict[int, int]
    length: int = 0


class SharedBlocks:
    """Knows the texts in the cache that end within a block: prompts, and prompts with answers.

    Args:
        capacity: Blocks of the cache; as many texts are kept.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: OrderedDict[int, None] = OrderedDict()

    def writer(self, prompt: Sequence[int]) -> Writer:
        """A request's entry; from now on its whole prompt is a beginning too."""
        keys = _keys(prompt)
        self._keep(keys[-1])
        begins = {
            key: -(-length // BLOCK_SIZE) * BLOCK_SIZE
            for length, key in enumerate(keys)
            if key in self._known and length % BLOCK_SIZE
        }
        return Writer(prompt, begins)

    def ended(self, writer: Writer, answer: Sequence[int]) -> None:
        """Keep a text whose request has ended; its last token is in the cache or not."""
        for key in _keys([*writer.prompt, *answer])[-2:]:
            self._keep(key)

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


def _keys(tokens: Sequence[int]) -> list[int]:
    """A key for each beginning of ``tokens``, the empty one first."""
    return list(accumulate(tokens, lambda key, token: hash((key, token)), initial=_SEED))
