"""How far a model's download or loading is, as lines for the log, the terminal and /status."""

import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")

PROGRESS_SECONDS = 0.5
"""Minimum time between two reports of what has come."""

_RATE_SAMPLES = 6
_REPORTED_BYTES = 1_000_000


class Progress(Protocol):
    """Called with a line at each stage, and twice a second where it is known how far that is."""

    def __call__(self, message: str, percent: int | None = None, /) -> None:
        """Take a line and, where it is known, how much of the stage is done."""


class Transfer:
    """Reports twice a second how much of a download has come, how fast, and the time left."""

    def __init__(self, what: str, progress: Progress) -> None:
        self._what = what
        self._progress = progress
        self._lock = threading.Lock()
        self._reported = time.monotonic()
        # When how many bytes were here, in the last seconds: files begin and end with a wait.
        self._samples: deque[tuple[float, float]] = deque(maxlen=_RATE_SAMPLES)

    def came(self, here: float, total: float) -> None:
        """Report, if it is due, that ``here`` of ``total`` bytes are here."""
        now = time.monotonic()
        with self._lock:
            last, due = self._reported, now - self._reported >= PROGRESS_SECONDS
            if due:
                self._reported = now
        # The small files come first, one by one; the total grows with each.
        if not due or total < _REPORTED_BYTES:
            return
        percent = int(100 * here / total)
        text = f"{self._what}: {percent} % of {total / 1e6:,.0f} MB"
        before, had = self._samples[0] if self._samples else (last, here)
        self._samples.append((now, here))
        if here > had:
            rate = (here - had) / (now - before)
            left = (total - here) / rate
            text += f", {rate / 1e6:,.1f} MB/s, {left:,.0f} s left"
        self._progress(text, percent)


def counted(items: Collection[T], what: str, progress: Progress) -> Iterator[T]:
    """Yield tensors, and report twice a second how many are done."""
    reported = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if (now := time.monotonic()) - reported >= PROGRESS_SECONDS:
            reported, percent = now, 100 * done // len(items)
            progress(f"{what}: {percent} % of {len(items):,} tensors", percent)
