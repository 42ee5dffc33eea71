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
from app.llm.engine.mailbox import Mailbox
from app.llm.engine.slots import Slots
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


class _Meter:
    """Observes one request's timings."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._admitted_at = time.perf_counter()
        self._last: float | None = None

    def begun(self, prompt_tokens: int) -> None:
        """The engine takes the request up."""
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
        self._mailbox = Mailbox()
        self._turn: asyncio.Future[None] | None = None
        self._unfinished: GenerationRequest | None = None
        self._prompt_tokens = 0
        self._begun = False
        self._answered = False
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
        if self._error is None and not (self._begun or self._answered):
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
            self._turn = asyncio.get_running_loop().create_future()
            self._queue.wait(self)
            await self._turn
            # It may have failed since the turn was given.
            self._check()
            self._link.submit(request, self)
            self._unfinished = request
            self._prompt_tokens = len(request.prompt_token_ids)
            self._queue.handed_over(self)
            while True:
                for event in await self._mailbox.take():
                    self._meter.observe(event)
                    if event.finish_reason is not None:
                        self._unfinished = None
                        if event.finish_reason == "error":
                            raise InternalError
                    yield event
                    if event.finish_reason is not None:
                        return
        finally:
            self.release()

    @property
    def wants_turn(self) -> bool:
        """Whether it waits for its turn, and has not failed."""
        return self._turn is not None and not self._turn.done()

    def take_turn(self) -> None:
        """Its turn has come."""
        if self._turn is not None:
            self._turn.set_result(None)

    def begun(self) -> None:
        """The engine takes the request up: it has a slot in the batch."""
        self._begun = True
        self._meter.begun(self._prompt_tokens)

    def deliver(self, event: TokenEvent) -> None:
        """Take an event from the engine."""
        self._mailbox.put(event)
        # After a restart the engine takes requests up in another order than it is computed here.
        self._answered = True
        if event.finish_reason is not None:
            # Its slot is free now, whenever its reader gets to its last event.
            self._queue.end_turn(self, served=event.finish_reason != "error")

    def fail(self, error: ServiceError) -> None:
        """End the request with ``error``, wherever it is."""
        if self._error is not None:
            return
        self._error = error
        if self._preparing is not None:
            self._preparing.reschedule(0.0)
        if self._turn is not None and self.wants_turn:
            self._turn.set_exception(error)
        self._mailbox.fail(error)
        self._stop_engine()

    def finish(self) -> None:
        """Stop the engine, since the answer is complete before the engine thinks so."""
        if self._stop_engine(served=True):
            self._meter.ended("stop")

    def release(self) -> None:
        """Give the place back, and stop what still runs. May be called twice."""
        if self._released:
            return
        self._released = True
        for timer in self._timers:
            timer.cancel()
        self._queue.leave(self, left_early=self._stop_engine())

    def _stop_engine(self, *, served: bool = False) -> bool:
        request, self._unfinished = self._unfinished, None
        if request is not None:
            self._link.cancel(request.id)
            self._queue.end_turn(self, served=served)
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
        # Those of them whose turn has ended.
        self._ended: set[Admission] = set()
        self._turns: FairTurns[Admission] = FairTurns()
        self._slots = Slots(limits.max_running, clock)
        self._capacity = limits.max_running + limits.max_waiting
        self._reserved = limits.max_waiting // _RESERVED_PART

    @property
    def is_crowded(self) -> bool:
        """Whether :meth:`check` would refuse some caller."""
        return len(self._admissions) >= self._capacity - self._reserved

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
            seconds = self._slots.departures.promise(excess + 1, self._capacity)
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
        seconds = self._slots.departures.seconds_until(waiting)
        return OverloadedError(retry_after=min(seconds, _MAX_RETRY_AFTER))

    def wait(self, admission: Admission) -> None:
        """Give a request its turn when that comes."""
        self._turns.wait(admission.caller, admission)
        self._next_turns()

    def handed_over(self, admission: Admission) -> None:
        """A request that has its turn has been submitted to the engine."""
        self._slots.hand_over(admission)
        self._show()

    def end_turn(self, admission: Admission, *, served: bool = False) -> None:
        """Free what a request holds of the engine; nothing happens where it holds nothing.

        Args:
            admission: The request. Its place is its own until it leaves.
            served: Whether it got its whole answer.
        """
        if self._slots.end_turn(admission, served=served):
            self._ended.add(admission)
            self._turns.finish(admission.caller)
            self._next_turns()

    def leave(self, admission: Admission, *, left_early: bool) -> None:
        """Give back a place, and the turn or the wish for one with it."""
        if left_early:
            self._metrics.cancelled.inc()
        self.end_turn(admission)
        self._turns.withdraw(admission.caller, admission)
        self._turns.leave(admission.caller)
        self._admissions.discard(admission)
        self._ended.discard(admission)
        self._show()

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
        running = self._slots.running
        return QueueSnapshot(
            running=running,
            waiting=len(self._admissions) - running - len(self._ended),
            max_running=self._limits.max_running,
            max_waiting=self._limits.max_waiting,
        )

    def _next_turns(self) -> None:
        while self._slots.has_room and (head := self._turns.head()):
            caller, admission = head
            if not admission.wants_turn:
                # It failed or was cancelled, and has not left yet.
                self._turns.withdraw(caller, admission)
                continue
            self._turns.serve()
            self._slots.give_turn(admission)
            admission.take_turn()
        self._show()

    def _show(self) -> None:
        now = self.snapshot()
        self._metrics.running.set(now.running)
        self._metrics.waiting.set(now.waiting)
