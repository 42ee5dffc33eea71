"""The requests that are with the engine, and what becomes of them when its process dies.

A request that had brought no token is tried once more, for its caller cannot tell. It may be what
killed the engine, though. So those that died with it are tried one after the other, each when the
one before has brought its first token: what kills the engine again is alone, and is named.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from app.core.logging import get_logger
from app.llm.engine.admission import Place
from app.llm.engine.base import GenerationRequest, Step
from app.utils.errors import EngineUnavailableError

log = get_logger("engine")


@dataclass(slots=True)
class _Flight:
    """One request.

    Attributes:
        request: What is to be answered.
        place: Where its events go.
        submitted: Whether the present engine process has it.
        answered: Whether an event has come; what its caller may have seen is never repeated.
        suspect: Whether an engine process died with it.
    """

    request: GenerationRequest
    place: Place
    submitted: bool = False
    answered: bool = False
    suspect: bool = False

    def log(self, level: int, message: str, **extra: str) -> None:
        """Say something about this request."""
        about = {"engine_request": self.request.id, **extra}
        self.place.context.run(log.log, level, message, extra=about)


class InFlight:
    """Requests by their ids, from their submission to their last event."""

    def __init__(self, submit: Callable[[GenerationRequest], None]) -> None:
        """There are none yet, and no engine.

        Args:
            submit: Sends a request to the engine process; called only while there is one.
        """
        self._send = submit
        self._has_engine = False
        self._flights: dict[str, _Flight] = {}
        self._suspects: deque[_Flight] = deque()
        self._on_trial: _Flight | None = None

    @property
    def engine_is_asked(self) -> bool:
        """Whether there is an engine process, and it has something to do."""
        return self._has_engine and bool(self._flights)

    def add(self, request: GenerationRequest, place: Place) -> None:
        """A request is to be answered, by the next engine process if there is none."""
        flight = self._flights[request.id] = _Flight(request, place)
        if self._has_engine:
            self._submit(flight)

    def remove(self, request_id: str) -> bool:
        """Forget a request; returns whether the engine has it."""
        flight = self._flights.pop(request_id, None)
        if flight is None:
            return False
        self._end_trial(flight)
        return flight.submitted

    def dispatch(self, step: Step) -> None:
        """Tell places what the engine has told about their requests."""
        for request_id in step.started:
            if flight := self._flights.get(request_id):
                flight.place.slot_taken()
        for event in step.events:
            flight = self._flights.get(event.request_id)
            if flight is None:
                # It has left, and the engine had not heard of it when this step began.
                continue
            flight.answered = True
            self._end_trial(flight)
            if event.finish_reason is not None:
                del self._flights[event.request_id]
            if event.error:
                flight.log(logging.ERROR, "a request failed in the engine", reason=event.error)
            flight.place.deliver(event)

    def engine_started(self) -> None:
        """There is an engine process again: submit what waits for it."""
        self._has_engine = True
        for flight in self._flights.values():
            if not flight.suspect:
                self._submit(flight)
        self._begin_trial()

    def engine_died(self) -> None:
        """End what has been answered in part, and what dies for the second time."""
        self._has_engine = False
        self._on_trial = None
        for flight in [flight for flight in self._flights.values() if flight.submitted]:
            flight.submitted = False
            if not flight.answered and not flight.suspect:
                flight.suspect = True
                flight.place.slot_lost()
                self._suspects.append(flight)
                flight.log(
                    logging.WARNING,
                    "the engine process died with this request: it is tried once more",
                )
                continue
            again = "again: it is given up" if flight.suspect else "half answered"
            flight.log(logging.ERROR, f"the engine process died with this request {again}")
            del self._flights[flight.request.id]
            flight.place.fail(EngineUnavailableError())

    def _submit(self, flight: _Flight) -> None:
        flight.submitted = True
        self._send(flight.request)

    def _begin_trial(self) -> None:
        while self._on_trial is None and self._suspects:
            flight = self._suspects.popleft()
            if flight.request.id in self._flights:
                self._on_trial = flight
                self._submit(flight)

    def _end_trial(self, flight: _Flight) -> None:
        if flight is self._on_trial:
            self._on_trial = None
            self._begin_trial()
