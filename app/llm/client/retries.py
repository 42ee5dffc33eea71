"""The submitted requests, and their retries after the engine process died.

A request without an event so far is tried once more, since its caller notices nothing. But it may
have killed the engine. So the next engine process gets such suspects one at a time, each after the
first event of the one before. A suspect with which the process dies again fails.
"""

import logging
from collections.abc import Callable

from app.core.logging import get_logger
from app.llm.client.place import Place
from app.llm.protocol import Cancel, Command, GenerationRequest, Step, Submit
from app.utils.errors import EngineFailedError

log = get_logger("engine")


class InFlight:
    """Places by their requests' ids, from the submission to the last event.

    Args:
        send: Sends a command to the engine process; drops it if there is none.
    """

    def __init__(self, send: Callable[[Command], None]) -> None:
        self._send_command = send
        self._has_engine = False
        self._places: dict[str, Place] = {}
        # The engine process must still report the end of these, also after their callers left.
        self._unfinished: set[str] = set()

    @property
    def engine_is_asked(self) -> bool:
        """Whether the engine process has requests whose end it has not reported."""
        return bool(self._unfinished)

    def submit(self, request: GenerationRequest, place: Place) -> None:
        """Send a request to the engine process, or to the next one if there is none."""
        # A request that goes on with an answer has what its caller has seen in its prompt.
        place.sent = place.answered = False
        self._places[request.id] = place
        if self._has_engine:
            self._send(place)

    def cancel(self, request_id: str) -> None:
        """Stop a request; the engine frees its slot before its next step."""
        if place := self._places.pop(request_id, None):
            if place.suspect:
                self._send_next_suspect()
            if place.sent:
                self._send_command(Cancel(request_id))

    def dispatch(self, step: Step) -> None:
        """Pass what the engine has reported to the requests' places."""
        for request_id in step.started:
            if place := self._places.get(request_id):
                place.slot_taken()
        for event in step.events:
            if event.finish_reason is not None:
                self._unfinished.discard(event.request_id)
            place = self._places.get(event.request_id)
            if place is None:
                # It was cancelled after this step had begun.
                continue
            place.answered = True
            if event.finish_reason is not None:
                del self._places[event.request_id]
            if place.suspect:
                self._send_next_suspect()
            if event.error:
                _log(place, logging.ERROR, "a request failed in the engine", reason=event.error)
            place.deliver(event)

    def engine_started(self) -> None:
        """There is an engine process again: send the requests that wait for it."""
        self._has_engine = True
        for place in self._places.values():
            if not place.suspect:
                self._send(place)
        self._send_next_suspect()

    def engine_died(self) -> None:
        """Fail the requests that must not be retried, and keep the others for the next engine."""
        self._has_engine = False
        self._unfinished.clear()
        for place in [place for place in self._places.values() if place.sent]:
            place.sent = False
            if not place.answered and not place.suspect:
                place.suspect = True
                place.slot_lost()
                message = "the engine process died with this request: it is tried once more"
                _log(place, logging.WARNING, message)
                continue
            again = "again: it is given up" if place.suspect else "half answered"
            _log(place, logging.ERROR, f"the engine process died with this request {again}")
            del self._places[place.request.id]
            place.fail(EngineFailedError(twice=place.suspect))

    def _send(self, place: Place) -> None:
        place.sent = True
        self._unfinished.add(place.request.id)
        self._send_command(Submit(place.request))

    def _send_next_suspect(self) -> None:
        suspects = [p for p in self._places.values() if p.suspect and not p.answered]
        if self._has_engine and suspects and not any(place.sent for place in suspects):
            self._send(suspects[0])


def _log(place: Place, level: int, message: str, **extra: str) -> None:
    about = {"engine_request": place.request.id, **extra}
    place.context.run(log.log, level, message, extra=about)
