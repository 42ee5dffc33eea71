"""One request's place: what it goes through from its admission to its release.

While it runs it also holds a *slot* in the engine's batch, from when the engine says so to its last
event. Everything here runs on the event loop of the API process.
"""

import asyncio
import time
import uuid
from contextvars import copy_context
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol, Self

from app.core.metrics import exemplar_var
from app.llm.ebnf.check import error_of
from app.llm.protocol import FinishReason, GenerationRequest, TokenEvent
from app.utils.errors import (
    DeadlineExceededError,
    EngineFailedError,
    RetryableError,
    ServiceError,
)

if TYPE_CHECKING:
    from app.llm.client.admission import RequestQueue


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
        answered: Whether an event of the present request has come. The caller may have seen it, so
            there is no retry.
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
        self._exemplar = exemplar_var.get()
        self.sent = self.answered = self.suspect = False
        self._listener = listener
        self._queue = queue
        self._link = link
        self._events: list[TokenEvent] = []
        self._tokens: list[int] = []
        self._news = asyncio.Event()
        self._error: ServiceError | None = None
        # How the engine's last request ended, and when; the answer may go on.
        self._ended: tuple[FinishReason, float] | None = None
        self._admitted_at = time.perf_counter()
        self._running_since: float | None = None
        self._began_at: float | None = None
        self._first_token_at: float | None = None
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

    def go_on(self, request: GenerationRequest) -> None:
        """Have the engine go on with another request, in the place and turn of the present one.

        Raises:
            ServiceError: The place has failed.
        """
        self._check()
        self._events.clear()
        self._tokens = list(request.prompt_token_ids)
        if self.stage is Stage.ENDED:
            # The engine was at the end before its tokens were read here.
            self.request, self.stage = request, Stage.WAITING
            self._queue.add(self)
            return
        self._link.cancel(self.request.id)
        self.request = request
        self.submit()

    async def events(self) -> list[TokenEvent]:
        """All events since the last call; waits for the first. The last has a finish reason.

        Raises:
            OverloadedError: The request waited too long for a slot.
            DeadlineExceededError: The request took too long.
            EngineUnavailableError: There was no engine process for too long.
            EngineFailedError: The engine process died with the request.
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

    def finish(self, reason: FinishReason = "stop") -> None:
        """Stop the engine, since the answer is complete before the engine thinks so."""
        self._end(reason)

    def fail(self, error: ServiceError) -> None:
        """End the request with ``error``, wherever it is; nothing happens where it has ended."""
        if self.stage is not Stage.ENDED:
            if self.suspect and not self.answered and isinstance(error, RetryableError):
                # It may be what killed the engine process, and is not to be sent to another copy.
                error = EngineFailedError()
            self._error = error
            self._end()
            self._news.set()
            if self._listener is not None and not self.accepted:
                self._listener.failed(error)

    def release(self) -> None:
        """Give the place back, and stop the request if it has not ended; may be called twice."""
        self._deadline.cancel()
        if self._end():
            self._queue.metrics.cancelled.inc()
        elif self._ended is not None:
            reason, seconds = self._ended
            self._queue.metrics.request_duration.labels(reason).observe(seconds, self._exemplar)
            self._ended = None
        self._queue.prompts.add(self._tokens, self.caller)
        self._queue.leave(self)

    def phases(self, now: float) -> list[tuple[str, float, float]]:
        """Waiting, reading the prompt and generating: name, beginning and end of each so far.

        Args:
            now: As :func:`time.perf_counter`, in which all times are.
        """
        begins = [
            ("queue", self._admitted_at),
            ("prefill", self._began_at),
            ("decode", self._first_token_at),
        ]
        known = [(name, begin) for name, begin in begins if begin is not None]
        ends = [*(begin for _, begin in known[1:]), now]
        return [(name, begin, end) for (name, begin), end in zip(known, ends, strict=True)]

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
            self._began_at = now
            self._queue_timeout.cancel()
            self._queue.metrics.queue_time.observe(now - self._admitted_at, self._exemplar)
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
        if stage in (Stage.PREPARING, Stage.ENDED):
            return False
        now = time.perf_counter()
        if reason is not None:
            self._ended = reason, now - self._admitted_at
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
        # A request that goes on finds its own tokens in the cache.
        if event.cached_tokens and self._last_token_at is None:
            metrics.prefix_cached_tokens.inc(event.cached_tokens)
            self.cached_tokens = min(event.cached_tokens, self._own_tokens)
        if new:
            metrics.tokens_generated.labels(self._queue.model).inc(new)
            if self._last_token_at is None:
                self._first_token_at = now
                metrics.time_to_first_token.observe(now - self._admitted_at, self._exemplar)
            else:
                metrics.inter_token_latency.observe((now - self._last_token_at) / new)
            self._last_token_at = now
