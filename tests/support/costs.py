"""Tells whether the cost of a function is linear in the length of its text."""

import os
import time
from collections.abc import Callable

_CHARACTERS = 100_000 if "FULL_SIZE" in os.environ else 20_000
# A hundredth of the text takes a hundredth of the time when the cost is linear, and a
# ten-thousandth when it is quadratic. The bound is ten times away from both.
_PART, _MOST_TIMES = 100, 1000
_REPEATS = 5
_FAST_SECONDS = _CHARACTERS / 100_000


def is_linear(
    function: Callable[[str], object], unit: str, *, fast_seconds: float = _FAST_SECONDS
) -> bool:
    """Whether the time for a long text is in proportion to that for a hundredth of it.

    The long text has 20,000 characters in the suite, and 100,000 in `make test-full`.

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
