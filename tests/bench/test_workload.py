"""The workload is decided by its seed."""

from itertools import pairwise
from random import Random

import pytest

from benchmarks.load.workload import Lengths, Workload, WorkloadError


def test_equal_seeds_plan_equal_rounds() -> None:
    """Equal seeds, rounds and counts give equal prompts, lengths and arrival times."""
    workload = Workload(Lengths((8, 64), uniform=True), Lengths((16, 32)), seed=7)
    plans = [workload.plan(50, round_name="a", rate=10) for _ in range(2)]
    assert plans[0] == plans[1]
    assert plans[0] != workload.plan(50, round_name="b", rate=10)
    other = Workload(Lengths((8, 64), uniform=True), Lengths((16, 32)), seed=8)
    assert plans[0] != other.plan(50, round_name="a", rate=10)


def test_prompts_differ_from_each_other_and_between_rounds() -> None:
    """All prompts of a run differ, so that no cache answers them."""
    workload = Workload()
    rounds = [workload.plan(200, round_name=name) for name in "ab"]
    prompts = [request.prompt for planned in rounds for request in planned]
    assert len(set(prompts)) == 400


@pytest.mark.parametrize("words", [1, 9, 10, 16, 300])
def test_a_prompt_has_as_many_words_as_asked_for(words: int) -> None:
    """A prompt has exactly the number of words of a fixed length."""
    planned = Workload(prompt_words=Lengths((words,))).plan(20, round_name="a")
    assert {len(request.prompt.split()) for request in planned} == {words}


def test_prompts_that_cannot_all_differ_are_refused() -> None:
    """A round of more prompts than there are of that length is rejected."""
    with pytest.raises(WorkloadError, match="not enough different prompts of 1 words"):
        Workload(prompt_words=Lengths((1,))).plan(2000, round_name="a")


def test_arrivals_come_at_the_rate_and_at_random() -> None:
    """Arrival times ascend, and their gaps have the mean and deviation of a Poisson process."""
    planned = Workload().plan(4000, round_name="a", rate=20)
    times = [0.0, *(request.at for request in planned)]
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert min(gaps) >= 0
    assert mean == pytest.approx(1 / 20, rel=0.05)
    assert spread == pytest.approx(mean, rel=0.1)


def test_lengths_are_drawn_from_their_distribution() -> None:
    """Uniform lengths include both bounds and nothing outside; a list gives its values only."""
    random = Random(0)
    uniform, listed = Lengths.parse("3-6"), Lengths.parse("3,9,27")
    assert {uniform.draw(random) for _ in range(200)} == {3, 4, 5, 6}
    assert {listed.draw(random) for _ in range(200)} == {3, 9, 27}
    assert [str(Lengths.parse(text)) for text in ("5", "3-6", "3,9")] == ["5", "3-6", "3,9"]


@pytest.mark.parametrize("text", ["", "0", "-3", "5-2", "1.5", "4,", "a", "0-3"])
def test_an_invalid_length_is_rejected(text: str) -> None:
    """An invalid distribution is an error that repeats its text."""
    with pytest.raises(WorkloadError, match="is not a length"):
        Lengths.parse(text)
