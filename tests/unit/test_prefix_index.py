"""The index predicts the hits of a block cache."""

from hypothesis import given
from hypothesis import strategies as st

from app.llm.prefix_index import BLOCK_SIZE, PrefixIndex


def test_whole_blocks_are_found() -> None:
    """The length of a common prefix is found in whole blocks."""
    index = PrefixIndex(100)
    tokens = list(range(5 * BLOCK_SIZE))
    assert index.find(tokens) == 0
    index.add(tokens[: 3 * BLOCK_SIZE + 5])
    assert index.find(tokens) == 3 * BLOCK_SIZE
    assert index.find([-1, *tokens]) == 0
    assert index.find(tokens[: BLOCK_SIZE + 3]) == BLOCK_SIZE


def test_owners_share_no_blocks() -> None:
    """What one owner added is not found by another."""
    index = PrefixIndex(100)
    tokens = list(range(2 * BLOCK_SIZE + 1))
    index.add(tokens, "a")
    assert [index.find(tokens, owner) for owner in ("a", "b", "")] == [2 * BLOCK_SIZE, 0, 0]


def test_the_last_token_is_always_computed() -> None:
    """The last token of a cached prompt does not count, because its logits are needed."""
    index = PrefixIndex(100)
    tokens = list(range(2 * BLOCK_SIZE))
    index.add(tokens)
    assert index.find(tokens) == 2 * BLOCK_SIZE - 1


def test_a_block_depends_on_the_tokens_before_it() -> None:
    """Equal blocks after different tokens are different blocks."""
    index = PrefixIndex(100)
    block = list(range(BLOCK_SIZE))
    index.add([7] * BLOCK_SIZE + block)
    assert index.find([*block, 1]) == 0


def test_the_least_recently_used_goes_first() -> None:
    """The least recently added or found block is evicted."""
    index = PrefixIndex(2)
    first, second, third = ([n] * (BLOCK_SIZE + 1) for n in (1, 2, 3))
    index.add(first)
    index.add(second)
    assert index.find(first) == BLOCK_SIZE
    index.add(third)
    assert index.find(second) == 0
    assert index.find(first) == BLOCK_SIZE
    assert index.find(third) == BLOCK_SIZE


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4 * BLOCK_SIZE), max_size=20))
def test_nothing_is_found_that_was_not_added(prompts: list[list[int]]) -> None:
    """A prefix that is found is a prefix of a prompt that was added."""
    index = PrefixIndex(1000)
    for number, prompt in enumerate(prompts):
        found = index.find(prompt)
        assert 0 <= found < max(len(prompt), 1)
        assert found == 0 or any(earlier[:found] == prompt[:found] for earlier in prompts[:number])
        index.add(prompt)
