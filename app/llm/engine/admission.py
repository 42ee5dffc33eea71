"""Places for requests: how many may run and wait, whose turn it is, and what each one receives.

Everything here runs on the event loop of the API process and knows the engine only as a link
to submit to and cancel on.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from app.core.config_engine import EngineSettings
from app.core.metrics import Metrics
from app.llm.engine.base import FinishReason, GenerationRequest, TokenEvent
from app.llm.engine.departures import Departures
from app.llm.engine.turns import FairTurns
from app.utils.errors import (
    DeadlineExceededError,
    InternalError,
    OverloadedError,
    ServiceError,
)

T = TypeVar("T")

# The official clients heed no longer time than this.
_MAX_RETRY_AFTER = 60.0
# One part in so many of the waiting places is kept for callers that hold no place.
_RESERVED_PART = 8


class EngineLink(Protocol):
    """The way to the engine process."""

    def submit(self, request: GenerationRequest, admission: "Admission") -> None:
        """Start a request; its events go to ``admission``.

        Raises:
            EngineUnavailableError: There is no engine to start it.
        """

    def cancel(self, request_id: str) -> None:
        """Stop a request that has not ended."""


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """How full the engine is."""

    running: int
    waiting: int
    max_running: int
    max_waiting: int


class _Mailbox:
    """Events of one request between the socket's reader and whoever generates.

    Events that come while nobody looks are handed over together.
    """

    def __init__(self) -> None:
        self._events: list[TokenEvent] = []
        self._error: ServiceError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._wake()

    def fail(self, error: ServiceError) -> None:
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[TokenEvent]:
        """All events since the last call; waits for the first.

        Raises:
            ServiceError: The request failed, and every event before that has been taken.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        return events


class _Meter:
    """Observes one request's timings."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._admitted_at = time.perf_counter()
        self._last: float | None = None

    def started(self, prompt_tokens: int) -> None:
        """The request left the queue."""
        self._metrics.queue_time.observe(time.perf_counter() - self._admitted_at)
        self._metrics.prompt_tokens.inc(prompt_tokens)

    def observe(self, event: TokenEvent) -> None:
        """An event came."""
        now = time.perf_counter()
        metrics = self._metrics
        if event.cached_tokens:
            metrics.prefix_cached_tokens.inc(event.cached_tokens)
        if event.token_ids:
            metrics.tokens_generated.labels(self._model).inc(len(event.token_ids))
            if self._last is None:
                metrics.time_to_first_token.observe(now - self._admitted_at)
            else:
                metrics.inter_token_latency.observe((now - self._last) / len(event.token_ids))
            self._last = now
        if event.finish_reason:
            self.ended(event.finish_reason)

    def ended(self, reason: FinishReason) -> None:
        """The answer is complete, or has failed."""
        seconds = time.perf_counter() - self._admitted_at
        self._metrics.request_duration.labels(reason).observe(seconds)


class Admission:
    """A place among the running and waiting requests, held until :meth:`release`."""

    def __init__(self, queue: "RequestQueue", link: EngineLink, caller: str, meter: _Meter) -> None:
        self.caller = caller
        self._queue = queue
        self._link = link
        self._meter = meter
        self._mailbox = _Mailbox()
        self._turn: asyncio.Future[None] | None = None
        self._unfinished: GenerationRequest | None = None
        self._served = False
        self._released = False
        self._error: ServiceError | None = None
        self._preparing: asyncio.Timeout | None = None
        self._timers: list[asyncio.TimerHandle] = []

    def set_deadlines(self, *, end: float, begin: float) -> None:
        """Fail the request if it has not ended, or not begun to run, within so many seconds."""
        loop = asyncio.get_running_loop()
        self._timers.append(loop.call_later(end, lambda: self.fail(DeadlineExceededError())))
        if begin < end:
            self._timers.append(loop.call_later(begin, self._waited_too_long))

    def _waited_too_long(self) -> None:
        if self._error is None and (self._turn is None or not self._turn.done()):
            self.fail(self._queue.timed_out())

    async def prepare(self, work: Awaitable[T]) -> T:
        """Wait for work that comes before :meth:`generate`, unless the request fails meanwhile.

        Raises:
            ServiceError: It failed; the work was cancelled.
        """
        self._check()
        try:
            async with asyncio.timeout(None) as self._preparing:
                return await work
        except TimeoutError:
            self._check()
            raise
        finally:
            self._preparing = None

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Run ``request`` and yield its events; the last one has a finish reason.

        Raises:
            OverloadedError: The request waited too long for its turn.
            DeadlineExceededError: The request took too long.
            EngineUnavailableError: The engine process died.
            DrainingError: The service is shutting down.
            InternalError: This request failed inside the engine.
        """
        try:
            self._check()
            self._turn = self._queue.turn(self)
            await self._turn
            # It may have failed since the turn was given.
            self._check()
            self._link.submit(request, self)
            self._unfinished = request
            self._meter.started(len(request.prompt_token_ids))
            while True:
                for event in await self._mailbox.take():
                    self._meter.observe(event)
                    if event.finish_reason is not None:
                        self._unfinished = None
                        if event.finish_reason == "error":
                            raise InternalError
                        self._served = True
                    yield event
                    if event.finish_reason is not None:
                        return
        finally:
            self.release()

    def deliver(self, event: TokenEvent) -> None:
        """Take an event from the engine."""
        self._mailbox.put(event)

    def fail(self, error: ServiceError) -> None:
        """End the request with ``error``, wherever it is."""
        if self._error is not None:
            return
        self._error = error
        if self._preparing is not None:
            self._preparing.reschedule(0.0)
        if self._turn is not None and not self._turn.done():
            self._turn.set_exception(error)
        self._mailbox.fail(error)
        self._stop_engine()

    def finish(self) -> None:
        """Stop the engine, since the answer is complete before the engine thinks so."""
        if self._stop_engine():
            self._served = True
            self._meter.ended("stop")

    def release(self) -> None:
        """Give the place back, and stop what still runs. May be called twice."""
        if self._released:
            return
        self._released = True
        for timer in self._timers:
            timer.cancel()
        left_early = self._stop_engine()
        self._queue.leave(self, self._turn, left_early=left_early, served=self._served)

    def _stop_engine(self) -> bool:
        request, self._unfinished = self._unfinished, None
        if request is not None:
            self._link.cancel(request.id)
        return request is not None


class RequestQueue:
    """All places: bounded in number, and handed out fairly between callers."""

    def __init__(
        self,
        limits: EngineSettings,
        metrics: Metrics,
        model: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an empty queue.

        Args:
            limits: How many may run and wait, and for how long.
            metrics: Where timings and the queue's length go.
            model: Name of the model, for the metrics.
            clock: Measures how long requests run.
        """
        self._limits = limits
        self._metrics = metrics
        self._model = model
        self._admissions: set[Admission] = set()
        self._turns: FairTurns[asyncio.Future[None]] = FairTurns()
        self._running = 0
        self._capacity = limits.max_running + limits.max_waiting
        self._reserved = limits.max_waiting // _RESERVED_PART
        self._departures = Departures(limits.max_running, clock)

    def check(self, caller: str) -> None:
        """Say whether a place is free for a caller.

        The last eighth of the waiting places is kept for callers that hold none, so that one
        with many requests cannot shut the others out.

        Raises:
            OverloadedError: There is none.
        """
        open_to_it = self._capacity - (self._reserved if self._turns.places(caller) else 0)
        excess = len(self._admissions) - open_to_it
        if excess >= 0:
            seconds = self._departures.promise(excess + 1, self._capacity)
            raise OverloadedError(retry_after=min(seconds, _MAX_RETRY_AFTER))

    def admit(self, link: EngineLink, caller: str) -> Admission:
        """Take a place; no one else can between :meth:`check` and this, on one event loop.

        Raises:
            OverloadedError: There is none for this caller.
        """
        self.check(caller)
        limits = self._limits
        admission = Admission(self, link, caller, _Meter(self._metrics, self._model))
        admission.set_deadlines(
            end=limits.request_timeout_seconds, begin=limits.queue_timeout_seconds
        )
        self._admissions.add(admission)
        self._turns.enter(caller)
        self._show()
        return admission

    def timed_out(self) -> OverloadedError:
        """What a request ends with that has waited too long; counted as refused."""
        self._metrics.rejected.labels("queue_timeout").inc()
        waiting = max(self.snapshot().waiting, 1)
        seconds = self._departures.seconds_until(waiting)
        return OverloadedError(retry_after=min(seconds, _MAX_RETRY_AFTER))

    def turn(self, admission: Admission) -> asyncio.Future[None]:
        """Done when the request may run; must be given to :meth:`leave`."""
        turn = asyncio.get_running_loop().create_future()
        self._turns.wait(admission.caller, turn)
        self._next_turns()
        return turn

    def leave(
        self,
        admission: Admission,
        turn: asyncio.Future[None] | None,
        *,
        left_early: bool,
        served: bool,
    ) -> None:
        """Give back a place and, if it had one, its turn."""
        self._admissions.discard(admission)
        if left_early:
            self._metrics.cancelled.inc()
        if turn is not None:
            had_turn = turn.done() and not turn.cancelled() and turn.exception() is None
            turn.cancel()
            if had_turn:
                self._running -= 1
                self._turns.finish(admission.caller)
                self._departures.end(turn, served=served)
            else:
                self._turns.withdraw(admission.caller, turn)
        self._turns.leave(admission.caller)
        self._next_turns()

    def fail_all(self, error: Callable[[], ServiceError]) -> None:
        """End every request, each with an error of its own."""
        for admission in list(self._admissions):
            admission.fail(error())

    @property
    def is_empty(self) -> bool:
        """Whether no place is taken."""
        return not self._admissions

    def snapshot(self) -> QueueSnapshot:
        """How full the engine is."""
        return QueueSnapshot(
            running=self._running,
            waiting=len(self._admissions) - self._running,
            max_running=self._limits.max_running,
            max_waiting=self._limits.max_waiting,
        )

    def _next_turns(self) -> None:
        while self._running < self._limits.max_running and (head := self._turns.head()):
            caller, turn = head
            if turn.done():
                # It failed or was cancelled, and has not left yet.
                self._turns.withdraw(caller, turn)
                continue
            self._turns.serve()
            self._running += 1
            self._departures.start(turn)
            turn.set_result(None)
        self._show()

    def _show(self) -> None:
        self._metrics.running.set(self._running)
        self._metrics.waiting.set(len(self._admissions) - self._running)
