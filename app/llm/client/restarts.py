"""Whether a dead engine process is started again, and after how long."""

import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 600.0
"""``engine.max_restarts`` counts deaths within this time."""

# After this many failed starts in a row another attempt is of no use.
_MAX_FAILED_STARTS = 3
_LONGEST_DELAY = 30.0


class Restarts:
    """Remembers the deaths of engine processes.

    Args:
        max_restarts: Restarts allowed within :data:`WINDOW_SECONDS`.
        clock: In seconds.
    """

    def __init__(self, max_restarts: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_restarts = max_restarts
        self._clock = clock
        self._deaths: deque[float] = deque()
        self._failed_starts = 0

    def died(self, *, was_ready: bool) -> str | None:
        """A process has died; returns why none must be started again, for the log, if so."""
        now = self._clock()
        self._deaths.append(now)
        while self._deaths[0] < now - WINDOW_SECONDS:
            self._deaths.popleft()
        self._failed_starts = 0 if was_ready else self._failed_starts + 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            return f"the engine process died {self._failed_starts} times while loading"
        if len(self._deaths) > self._max_restarts:
            return (
                f"the engine process died {len(self._deaths)} times within "
                f"{WINDOW_SECONDS / 60:.0f} minutes (engine.max_restarts is {self._max_restarts})"
            )
        return None

    @property
    def delay(self) -> float:
        """Seconds to wait before the next start: none the first time, then doubling."""
        deaths = max(len(self._deaths), self._failed_starts)
        return 0.0 if deaths <= 1 else min(2.0 ** (deaths - 2), _LONGEST_DELAY)
