"""Admission: how many requests may run and wait, and what each of them receives.

A request holds a *place* from its admission to its release. While it runs it also holds a *slot*
in the engine's batch, from when the engine says so to its last event. Everything here runs on the
event loop of the API process.
"""

import asyncio
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, Self

from app.core.config.engine import EngineSettings
from app.core.metrics import Metrics
from app.llm.ebnf.check import error_of
from app.llm.prefix_index import PrefixIndex
from app.llm.protocol import FinishReason, GenerationRequest, TokenEvent
from app.utils.errors import (
    DeadlineExceededError,
    OverloadedError,
    ServiceError,
)

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


class EngineLink(Protocol):
    """The way to the engine process."""

    def submit(self, request: GenerationRequest, place: "Place") -> None:
        """Send a request to the engine; its events go to ``place``."""

    def cancel(self, request_id: str) -> None:
        """Stop a request; one that has ended is ignored."""


class PlaceListener(Protocol):
    """Told what becomes of a request before its first event."""

    id: str
    """The request's."""

    def accepted(self) -> None:
        """The request has been queued for the engine."""

    def failed(self, error: ServiceError) -> None:
        """The place has failed before that; its prompt need not be prepared any further."""


class Stage(IntEnum):
    """How far a request has come."""

    PREPARING = 0
    WAITING = 1
    SUBMITTED = 2
    RUNNING = 3
    ENDED = 4


class Place:
    """A request's place. The code that took it releases it.

    Attributes:
        accepted: Whether :meth:`start` has queued a request.
        request: That request; not set before.
        cached_tokens: Tokens of the prompt that the KV cache had of the caller's own requests;
            known from the first event. It tells nothing of other callers' requests.
        completion_tokens: Tokens that :meth:`events` has returned so far.
        context: Where the place was taken, which names the HTTP request in the log.
        sent: Whether the present engine process has the request.
        answered: Whether an event has come. The caller may have seen it, so there is no retry.
        suspect: Whether an engine process died with the request.
    """

    request: GenerationRequest

    def __init__(
        self,
        queue: "RequestQueue",
        link: EngineLink,
        caller: str,
        listener: PlaceListener | None = None,
    ) -> None:
        self.id = listener.id if listener is not None else f"gen-{uuid.uuid4().hex}"
        self.caller = caller
        self.stage = Stage.PREPARING
        self.accepted = False
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = self._own_tokens = 0
        self.context = copy_context()
        self.sent = self.answered = self.suspect = False
        self._listener = listener
        self._queue = queue
        self._link = link
        self._events: list[TokenEvent] = []
        self._tokens: list[int] = []
        self._news = asyncio.Event()
        self._error: ServiceError | None = None
        self._admitted_at = time.perf_counter()
        self._running_since: float | None = None
        self._last_token_at: float | None = None
        limits, later = queue.limits, asyncio.get_running_loop().call_later
        self._queue_timeout = later(
            limits.queue_timeout_seconds, lambda: self.fail(queue.timed_out())
        )
        self._deadline = later(
            limits.request_timeout_seconds, lambda: self.fail(DeadlineExceededError())
        )

    # --- for the request's reader ----------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def start(self, request: GenerationRequest) -> None:
        """Queue the request for the engine; called once.

        Raises:
            ServiceError: The place has failed since its admission.
        """
        self._check()
        self.accepted = True
        self.prompt_tokens = len(request.prompt_token_ids)
        self.request = request
        self._tokens += request.prompt_token_ids
        self._own_tokens = self._queue.prompts.find(self._tokens, self.caller)
        self._queue.prompts.add(self._tokens, self.caller)
        self.stage = Stage.WAITING
        self._queue.add(self)
        if self._listener is not None:
            self._listener.accepted()

    async def events(self) -> list[TokenEvent]:
        """All events since the last call; waits for the first. The last has a finish reason.

        Raises:
            OverloadedError: The request waited too long for a slot.
            DeadlineExceededError: The request took too long.
            EngineUnavailableError: The engine process died.
            DrainingError: The service is shutting down.
            InvalidGrammarError: The engine's library refuses the request's grammar.
            InternalError: This request failed inside the engine.
        """
        while not self._events:
            self._check()
            self._news.clear()
            await self._news.wait()
        events, self._events = self._events, []
        for event in events:
            self._count(event)
        return events

    def finish(self) -> None:
        """Stop the engine, since the answer is complete before the engine thinks so."""
        self._end("stop")

    def fail(self, error: ServiceError) -> None:
        """End the request with ``error``, wherever it is; nothing happens where it has ended."""
        if self.stage is not Stage.ENDED:
            self._error = error
            self._end()
            self._news.set()
            if self._listener is not None and not self.accepted:
                self._listener.failed(error)

    def release(self) -> None:
        """Give the place back, and stop the request if it has not ended; may be called twice."""
        if self._end():
            self._queue.metrics.cancelled.inc()
        self._queue.prompts.add(self._tokens, self.caller)
        self._queue.leave(self)

    # --- for the queue and the engine ------------------------------------------------------

    def submit(self) -> None:
        """Send the request to the engine."""
        self.stage = Stage.SUBMITTED
        self._link.submit(self.request, self)

    def slot_taken(self) -> None:
        """The engine has taken the request into its batch."""
        now = time.perf_counter()
        if self._running_since is None:
            # The queue's time limit does not apply again where another engine process takes over.
            self._queue_timeout.cancel()
            self._queue.metrics.queue_time.observe(now - self._admitted_at)
            self._queue.metrics.prompt_tokens.inc(self.prompt_tokens)
        self._running_since = now
        self.stage = Stage.RUNNING

    def slot_lost(self) -> None:
        """The engine process died; the next one gets the request."""
        self.stage = Stage.SUBMITTED

    def deliver(self, event: TokenEvent) -> None:
        """Take an event from the engine."""
        if event.finish_reason == "error":
            self._error = self._error or error_of(event, self.request.grammar)
        else:
            self._events.append(event)
        if event.finish_reason is not None:
            # The slot is free now, whenever the reader gets to this event.
            self._end(event.finish_reason)
        self._news.set()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _end(self, reason: FinishReason | None = None) -> bool:
        """Take the request from the queue or the engine; returns whether the engine had it."""
        stage, self.stage = self.stage, Stage.ENDED
        self._queue_timeout.cancel()
        self._deadline.cancel()
        if stage in (Stage.PREPARING, Stage.ENDED):
            return False
        now = time.perf_counter()
        if reason is not None:
            seconds = now - self._admitted_at
            self._queue.metrics.request_duration.labels(reason).observe(seconds)
        if stage is not Stage.WAITING:
            self._link.cancel(self.request.id)
        if stage is Stage.RUNNING and reason not in (None, "error") and self._running_since:
            self._queue.served(now - self._running_since)
        self._queue.remove(self, stage)
        return stage is not Stage.WAITING

    def _count(self, event: TokenEvent) -> None:
        metrics, now, new = self._queue.metrics, time.perf_counter(), len(event.token_ids)
        self.completion_tokens += new
        self._tokens += event.token_ids
        if event.cached_tokens:
            metrics.prefix_cached_tokens.inc(event.cached_tokens)
            self.cached_tokens = min(event.cached_tokens, self._own_tokens)
        if new:
            metrics.tokens_generated.labels(self._queue.model).inc(new)
            if self._last_token_at is None:
                metrics.time_to_first_token.observe(now - self._admitted_at)
            else:
                metrics.inter_token_latency.observe((now - self._last_token_at) / new)
            self._last_token_at = now


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
