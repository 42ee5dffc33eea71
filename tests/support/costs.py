"""How what a function costs grows with the text that it is given."""

import time
from collections.abc import Callable

_CHARACTERS = 100_000
_UNREMARKABLE_SECONDS = 1.0
# A tenth of the text takes a tenth of the time, or, if the cost is quadratic, a hundredth.
_PART, _MOST_TIMES = 10, 30


def is_linear(function: Callable[[str], object], unit: str) -> bool:
    """Whether 100,000 characters, ``unit`` again and again, take no time out of proportion.

    Less than a second of processor time is in proportion. Where it is more, a slow machine or
    coverage's tracing are told from a cost that grows faster than the text by a tenth of the text.
    """
    whole = _seconds(function, unit, _CHARACTERS)
    if whole < _UNREMARKABLE_SECONDS:
        return True
    return whole < _MOST_TIMES * _seconds(function, unit, _CHARACTERS // _PART)


def _seconds(function: Callable[[str], object], unit: str, characters: int) -> float:
    text = (unit * characters)[:characters]
    started = time.process_time()
    function(text)
    return time.process_time() - started
