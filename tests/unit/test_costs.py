"""The tests' judge of costs tells a linear function from a quadratic one."""

from tests.support.costs import is_linear


def linear(text: str) -> None:
    """Search the text 20 times."""
    for _ in range(20):
        text.count("ab")


def quadratic(text: str) -> None:
    """Search the text the more often the longer it is."""
    for _ in range(len(text) // 50):
        text.count("ab")


def test_a_quadratic_cost_is_seen() -> None:
    """A quadratic function is not linear, and a linear one is, also where both are fast."""
    assert is_linear(linear, "aa", fast_seconds=0.0)
    assert not is_linear(quadratic, "aa", fast_seconds=0.0)
