"""The tests' own judge of costs can tell a linear function from a quadratic one."""

import pytest

from tests.support import costs


def linear(text: str) -> None:
    """Look at each character so many times."""
    for _ in range(20):
        text.count("ab")


def quadratic(text: str) -> None:
    """Look at all of the text again and again, the longer it is the more often."""
    for _ in range(len(text) // 50):
        text.count("ab")


def test_a_cost_that_grows_faster_than_the_text_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the time is worth looking at, as on a slow machine."""
    monkeypatch.setattr(costs, "_UNREMARKABLE_SECONDS", 0.0)
    assert costs.is_linear(linear, "aa")
    assert not costs.is_linear(quadratic, "aa")
