"""The submitted requests, and their retries after the engine process died.

A request without an event so far is tried once more, since its caller notices nothing. But it is a
suspect: it may have killed the engine. So the next engine process gets the suspects one at a time,
each after the first event of the one before. A suspect with which the process dies again fails, and
the log names it.
"""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from app.core.logging import get_logger
from app.llm.client.admission import Place
from app.llm.protocol import GenerationRequest, Step
from app.utils.errors import EngineUnavailableError

log = get_logger("engine")


@dataclass(slots=True)
class _Flight:
    """A submitted request.

    Attributes:
        request: The request.
        place: Where its events go.
        sent: Whether the present engine process has it.
        answered: Whether an event has come. Its caller may have seen it, so it is not retried.
        suspect: Whether an engine process died with it.
    """

    request: GenerationRequest
    place: Place
    sent: bool = False
    answered: bool = False
    suspect: bool = False

    def log(self, level: int, message: str, **extra: str) -> None:
        """Write a line about this request to the log."""
        about = {"engine_request": self.request.id, **extra}
        self.place.context.run(log.log, level, message, extra=about)


class InFlight:
    """Requests by their ids, from their submission to their last event.

    Args:
        send: Sends a request to the engine process; called only while there is one.
    """

    def __init__(self, send: Callable[[GenerationRequest], None]) -> None:
        self._send_request = send
        self._has_engine = False
        self._flights: dict[str, _Flight] = {}
        self._suspects: deque[_Flight] = deque()
        self._current_suspect: _Flight | None = None

    @property
    def engine_is_asked(self) -> bool:
        """Whether there is an engine process with requests to answer."""
        return self._has_engine and bool(self._flights)

    def add(self, request: GenerationRequest, place: Place) -> None:
        """Send a request to the engine process, or to the next one if there is none."""
        flight = self._flights[request.id] = _Flight(request, place)
        if self._has_engine:
            self._send(flight)

    def remove(self, request_id: str) -> bool:
        """Forget a request; returns whether the engine process has it."""
        flight = self._flights.pop(request_id, None)
        if flight is None:
            return False
        self._suspect_survived(flight)
        return flight.sent

    def dispatch(self, step: Step) -> None:
        """Pass what the engine has reported to the requests' places."""
        for request_id in step.started:
            if flight := self._flights.get(request_id):
                flight.place.slot_taken()
        for event in step.events:
            flight = self._flights.get(event.request_id)
            if flight is None:
                # It was cancelled after this step had begun.
                continue
            flight.answered = True
            self._suspect_survived(flight)
            if event.finish_reason is not None:
                del self._flights[event.request_id]
            if event.error:
                flight.log(logging.ERROR, "a request failed in the engine", reason=event.error)
            flight.place.deliver(event)

    def engine_started(self) -> None:
        """There is an engine process again: send the requests that wait for it."""
        self._has_engine = True
        for flight in self._flights.values():
            if not flight.suspect:
                self._send(flight)
        self._send_next_suspect()

    def engine_died(self) -> None:
        """Fail the requests that must not be retried, and keep the others for the next engine."""
        self._has_engine = False
        self._current_suspect = None
        for flight in [flight for flight in self._flights.values() if flight.sent]:
            flight.sent = False
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

    def _send(self, flight: _Flight) -> None:
        flight.sent = True
        self._send_request(flight.request)

    def _send_next_suspect(self) -> None:
        while self._current_suspect is None and self._suspects:
            flight = self._suspects.popleft()
            if flight.request.id in self._flights:
                self._current_suspect = flight
                self._send(flight)

    def _suspect_survived(self, flight: _Flight) -> None:
        if flight is self._current_suspect:
            self._current_suspect = None
            self._send_next_suspect()
