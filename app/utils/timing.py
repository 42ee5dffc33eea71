"""Clocks and durations."""

import time
from datetime import UTC, datetime


class Stopwatch:
    """Seconds since it was made, on the monotonic clock."""

    __slots__ = ("_start",)

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Elapsed time in seconds."""
        return time.perf_counter() - self._start


def utc_timestamp(epoch_seconds: float) -> str:
    """ISO 8601 in UTC with milliseconds and a Z: ``2024-01-01T12:00:00.000Z``."""
    stamp = datetime.fromtimestamp(epoch_seconds, tz=UTC)
    return f"{stamp:%Y-%m-%dT%H:%M:%S}.{stamp.microsecond // 1000:03d}Z"
