"""Prompts that share a beginning, in one batch: none reads what another wrote.

The suite takes half of the lengths, `make test-full` all.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

from app.llm.protocol import Backend, TokenEvent
from tests.support.backends import load, logprobs, request, rows, run, settings_of, tokens

_ALL = "FULL_SIZE" in os.environ
_LENGTHS = (5, 31, 33, 37, 63, 69) if _ALL else (31, 37, 69)
"""Lengths of prompts that are served first; the cache's blocks have 32 tokens."""


Loader = Callable[[str], Sequence[Backend]]


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> Loader:
    """Loads two of each backend, once for all tests."""
    return cache(lambda name: [load(settings_of(name, tiny_model_dir)) for _ in range(2)])


@pytest.fixture(params=rows(with_echo=False))
def pair(request: pytest.FixtureRequest, loaded: Loader) -> Sequence[Backend]:
    """Two backends, which have served no text that begins as this test's do."""
    return loaded(request.param)


def beginning(test: int, length: int) -> list[int]:
    """A text of so many tokens; no other test's begins with the same token."""
    return [(7 * i + test) % 90 + 3 for i in range(length)]


def branches(begun: list[int], count: int = 6) -> dict[str, list[int]]:
    """Prompts that go on in another way each, of other lengths, behind the same beginning."""
    return {
        f"{len(begun)}:{i}": [*begun, *((i * 11 + j) % 90 + 3 for j in range(1, 9 * i + 3))]
        for i in range(count)
    }


def test_branches_of_a_served_prompt_get_the_answers_that_they_get_alone(
    pair: Sequence[Backend],
) -> None:
    """Together, and one after the other without the beginning, they get the same tokens."""
    shared, alone = pair
    for length in _LENGTHS:
        begun = beginning(0, length)
        run(shared, request("served", begun, max_tokens=1))
        prompts = branches(begun)
        asked = {n: request(n, p, max_tokens=6, logprobs=True) for n, p in prompts.items()}
        together = run(shared, *asked.values())
        for name, one in asked.items():
            events = run(alone, one)[name]
            assert tokens(together[name]) == tokens(events), name
            assert logprobs(together[name]) == pytest.approx(logprobs(events), abs=0.05), name


def test_a_prompt_that_goes_on_from_a_running_one_gets_its_own_answer(
    pair: Sequence[Backend],
) -> None:
    """It joins while the other one writes into the block that both begin with."""
    shared, alone = pair
    for length in _LENGTHS:
        begun = beginning(1, length)
        prompts = branches(begun, 3)
        running = request("running", begun, max_tokens=12, logprobs=True)
        events: dict[str, list[TokenEvent]] = {}
        shared.add(running)
        for _ in range(2):
            for event in shared.step():
                events.setdefault(event.request_id, []).append(event)
        asked = {n: request(n, p, max_tokens=6, logprobs=True) for n, p in prompts.items()}
        for one in asked.values():
            shared.add(one)
        while shared.has_work():
            for event in shared.step():
                events.setdefault(event.request_id, []).append(event)
        for name, one in asked.items():
            assert tokens(events[name]) == tokens(run(alone, one)[name]), name
        assert tokens(events["running"]) == tokens(run(alone, running)["running"])


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "cancelled"])
def test_branches_of_an_answer_get_the_answers_that_they_get_alone(
    pair: Sequence[Backend], *, ended: bool
) -> None:
    """Prompts that go on from a prompt and its answer get the same tokens together as alone."""
    shared, alone = pair
    for length in (30, 41) if _ALL else (41,):
        prompt = beginning(2 + ended, length)
        first = request("first", prompt, max_tokens=24)
        answer = tokens(run(alone, first)["first"])
        shared.add(first)
        given = 0
        while given < (24 if ended else 9):
            given += sum(len(event.token_ids) for event in shared.step())
        shared.cancel("first")
        for kept in (given - 1, given):
            begun = [*prompt, *answer[:kept]]
            asked = [
                request(f"{i}", [*begun, *range(3 + i, 30 + 7 * i)], max_tokens=6) for i in range(4)
            ]
            events = run(shared, *asked)
            for one in asked:
                assert tokens(events[one.id]) == tokens(run(alone, one)[one.id]), (kept, one.id)


def test_a_request_that_waits_for_another_can_be_cancelled(loaded: Loader) -> None:
    """It never runs, and the one that it waited for goes on."""
    backend, _ = loaded("openvino")
    begun = beginning(4, 37)
    run(backend, request("served", begun, max_tokens=1))
    first, second = branches(begun, 2).items()
    backend.add(request(*first, max_tokens=3))
    backend.add(request(*second, max_tokens=3))
    backend.cancel(second[0])
    assert [e.request_id for _ in range(4) for e in backend.step()] == [first[0]] * 3
    assert not backend.has_work()
