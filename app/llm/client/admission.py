"""Admission: how many requests may run and wait, and which is the next one for the engine.

A request holds a place from its admission to its release. Everything here runs on the event loop of
the API process.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from app.core.config.engine import EngineSettings
from app.core.metrics import Metrics
from app.llm.client.place import EngineLink, Place, PlaceListener, Stage
from app.llm.prefix_index import PrefixIndex
from app.utils.errors import OverloadedError, ServiceError

# A slot becomes free between two steps; a request sent only then would miss the next one. So the
# engine gets one request more for this many slots: docs/adr/0023-requests-in-hand.md.
_SLOTS_PER_REQUEST_AHEAD = 8
# This part of the waiting places is kept for callers that hold no place.
_RESERVED_PART = 8
# Enough for a mean that does not jump with each request, few enough to follow a change of load.
_SAMPLES = 256
_SECONDS_BEFORE_THE_FIRST_SAMPLE = 5.0
# The official clients do not wait longer than this.
_MAX_RETRY_AFTER = 60.0


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """How full the engine is."""

    running: int
    waiting: int
    max_running: int
    max_waiting: int


class RequestQueue:
    """All places: bounded in number, and shared fairly between callers.

    The next request for the engine is one of the caller with the fewest requests there; among
    equals, of the caller served longest ago; within one caller, the request that came first. A new
    caller stands directly before the caller served last and behind all that have been waiting:
    docs/adr/0011-fair-turns-between-callers.md.

    Attributes:
        running: Requests in the engine's batch, as the engine has told.
        prompts: The latest prompts and answers, by caller.
    """

    def __init__(self, limits: EngineSettings, metrics: Metrics, model: str) -> None:
        self.limits = limits
        self.metrics = metrics
        self.model = model
        self.running = 0
        self.prompts = PrefixIndex()
        self._places: set[Place] = set()
        self._waiting: list[Place] = []
        # By caller, of those with a request that waits or is in the engine: when one of them
        # last went to the engine, counted in requests; and how many the engine has.
        self._last_served: dict[str, float] = {}
        self._in_engine: Counter[str] = Counter()
        self._submissions = 0
        self._max_submitted = limits.max_running + limits.max_running // _SLOTS_PER_REQUEST_AHEAD
        self._capacity = limits.max_running + limits.max_waiting
        self._reserved = limits.max_waiting // _RESERVED_PART
        self._seconds: deque[float] = deque(maxlen=_SAMPLES)
        metrics.running.set_function(lambda: self.running)
        metrics.waiting.set_function(lambda: self.snapshot().waiting)

    @property
    def is_crowded(self) -> bool:
        """Whether :meth:`check` would refuse some caller."""
        return len(self._places) >= self._capacity - self._reserved

    @property
    def is_empty(self) -> bool:
        """Whether no place is taken."""
        return not self._places

    def snapshot(self) -> QueueSnapshot:
        """How full the engine is."""
        waiting = sum(place.stage < Stage.RUNNING for place in self._places)
        return QueueSnapshot(
            self.running, waiting, self.limits.max_running, self.limits.max_waiting
        )

    def check(self, caller: str) -> None:
        """Say whether a place is free for a caller.

        The last eighth of the waiting places is kept for callers that hold none, so that one
        with many requests cannot shut the others out.

        Raises:
            OverloadedError: There is none.
        """
        if self.is_crowded and (
            len(self._places) >= self._capacity
            or any(place.caller == caller for place in self._places)
        ):
            raise OverloadedError(retry_after=self._retry_after())

    def admit(self, link: EngineLink, caller: str, listener: PlaceListener | None = None) -> Place:
        """Take a place.

        Raises:
            OverloadedError: There is none for this caller.
        """
        self.check(caller)
        place = Place(self, link, caller, listener)
        self._places.add(place)
        return place

    def leave(self, place: Place) -> None:
        """Give a place back."""
        self._places.discard(place)

    def fail_all(self, error: Callable[[], ServiceError]) -> None:
        """End every request, each with an error of its own."""
        # Those that wait end first; otherwise they would be submitted as others end.
        for place in sorted(self._places, key=lambda place: place.stage):
            place.fail(error())

    def timed_out(self) -> OverloadedError:
        """The error of a request that has waited too long for a slot; counted as rejected."""
        self.metrics.rejected.labels("queue_timeout").inc()
        return OverloadedError(retry_after=self._retry_after())

    def add(self, place: Place) -> None:
        """Submit a place's request when it is the next one and the engine has room."""
        # Were a newcomer first, callers that come and go could keep another waiting for ever.
        self._last_served.setdefault(place.caller, self._submissions - 0.5)
        self._waiting.append(place)
        self._submit_next()

    def remove(self, place: Place, stage: Stage) -> None:
        """A place's request has ended, in the stage that is given."""
        caller = place.caller
        if stage is Stage.WAITING:
            self._waiting.remove(place)
        else:
            self._in_engine[caller] -= 1
        if not self._in_engine[caller] and all(other.caller != caller for other in self._waiting):
            del self._last_served[caller], self._in_engine[caller]
        self._submit_next()

    def served(self, seconds: float) -> None:
        """A request has got its whole answer, and had its slot for this time."""
        self._seconds.append(seconds)

    def _submit_next(self) -> None:
        while self._waiting and self._in_engine.total() < self._max_submitted:
            place = min(self._waiting, key=self._rank)
            self._waiting.remove(place)
            self._submissions += 1
            self._last_served[place.caller] = self._submissions
            self._in_engine[place.caller] += 1
            place.submit()

    def _rank(self, place: Place) -> tuple[int, float]:
        return self._in_engine[place.caller], self._last_served[place.caller]

    def _retry_after(self) -> float:
        """Time in which the engine serves as many requests as wait now."""
        samples = self._seconds or [_SECONDS_BEFORE_THE_FIRST_SAMPLE]
        waiting = max(len(self._places) - self.limits.max_running, 1)
        seconds = sum(samples) / len(samples) * waiting / self.limits.max_running
        return min(seconds, _MAX_RETRY_AFTER)
