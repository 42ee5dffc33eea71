"""Tells whether the cost of a function is linear in the length of its text."""

import time
from collections.abc import Callable

_CHARACTERS = 100_000
# A hundredth of the text takes a hundredth of the time when the cost is linear, and a
# ten-thousandth when it is quadratic. The bound is ten times away from both.
_PART, _MOST_TIMES = 100, 1000
_REPEATS = 5


def is_linear(function: Callable[[str], object], unit: str, *, fast_seconds: float = 1.0) -> bool:
    """Whether the time for 100,000 characters is in proportion to that for 1,000.

    Args:
        function: Gets the text.
        unit: Repeated to make the text.
        fast_seconds: Processor time below which the cost counts as linear without a comparison.
    """
    whole = _seconds(function, unit, _CHARACTERS)
    if whole < fast_seconds:
        return True
    part = min(_seconds(function, unit, _CHARACTERS // _PART) for _ in range(_REPEATS))
    return whole < _MOST_TIMES * part


def _seconds(function: Callable[[str], object], unit: str, characters: int) -> float:
    text = (unit * characters)[:characters]
    started = time.process_time()
    function(text)
    return time.process_time() - started
