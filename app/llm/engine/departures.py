"""When places become free, estimated from how long requests have been running."""

import time
from collections import deque
from collections.abc import Callable
from itertools import islice

# Enough for a mean that does not jump with each request, few enough to follow a change of load.
_SAMPLES = 256
_UNMEASURED_SECONDS = 5.0


class Departures:
    """Measures how long requests hold their turn, and foretells when the next turns end.

    A request that was cancelled, failed or still runs says only that serving it would have taken
    longer than that. It counts where that is longer than the mean; counting it in any case would
    make a service whose callers leave early look fast.
    """

    def __init__(self, max_running: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing has been measured.

        Args:
            max_running: How many turns there are.
            clock: Seconds, never going back.
        """
        self._max_running = max_running
        self._clock = clock
        self._started: dict[object, float] = {}
        self._samples: deque[float] = deque(maxlen=_SAMPLES)
        self._mean_of_samples = 0.0
        # Calls of :meth:`promise` that have not come due, as far as is known.
        self._promised = 0.0
        self._promised_at = clock()

    def start(self, key: object) -> None:
        """A request got its turn."""
        self._started[key] = self._clock()

    def end(self, key: object, *, served: bool) -> None:
        """A request's turn ended.

        Args:
            key: As it was for :meth:`start`.
            served: Whether it got its whole answer.
        """
        seconds = self._clock() - self._started.pop(key)
        if served or (self._samples and seconds > self._mean_of_samples):
            self._samples.append(seconds)
            # Turns end less often than they are asked about, when more is refused than served.
            self._mean_of_samples = sum(self._samples) / len(self._samples)

    def seconds_until(self, place: int) -> float:
        """Time until that many turns will have ended, the first of them being number 1.

        A turn is expected to last as long as the mean, so the one that has lasted longest ends
        first; but so many turns do not end in less than half the time that they take on average.
        A turn that has outlasted the mean says nothing about when it will end; then it is that
        average time.
        """
        return self._seconds_until(place, self._mean())

    def promise(self, place: int, most: int) -> float:
        """Time until a place is free for one who was refused, behind those refused before.

        Args:
            place: How many turns must end before there would be a place for it, were it the
                only one to come back.
            most: With more than this many to come back, each is told to come after as many turns.
        """
        now = self._clock()
        mean = self._mean()
        due = (now - self._promised_at) * self._max_running / max(mean, 1e-9)
        ahead = max(self._promised - due, 0.0)
        self._promised = min(ahead + 1, most)
        self._promised_at = now
        return self._seconds_until(min(place + round(ahead), most), mean)

    def _seconds_until(self, place: int, mean: float) -> float:
        running = len(self._started)
        at_mean_rate = place * mean / self._max_running
        if not running:
            return at_mean_rate
        rounds, position = divmod(place - 1, running)
        start = next(islice(self._started.values(), position, None))
        remaining = mean - (self._clock() - start)
        if remaining <= 0:
            return max(rounds * mean, at_mean_rate)
        return max(rounds * mean + remaining, at_mean_rate / 2)

    def _mean(self) -> float:
        """How long a turn lasts."""
        now = self._clock()
        if not self._samples:
            oldest = next(iter(self._started.values()), now)
            return max(_UNMEASURED_SECONDS, now - oldest)
        mean = self._mean_of_samples
        total, number = mean * len(self._samples), len(self._samples)
        for start in self._started.values():
            if now - start <= mean:
                break
            total += now - start
            number += 1
        return total / number
