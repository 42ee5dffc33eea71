"""The API process's side of the engine: admission, deadlines, cancellation, supervision.

All methods run on the event loop of the API process. A request takes three steps: it is
admitted (or refused) before any work is spent on it, it waits its turn, and its events are read
until the last. Leaving at any point frees what it held, at the latest within one engine step.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from enum import StrEnum

from app.core.config import EngineSettings, LoggingSettings, ModelSettings
from app.core.logging import get_logger
from app.core.metrics import Metrics
from app.llm.engine.base import (
    Cancel,
    Configure,
    EngineInfo,
    EngineStats,
    GenerationRequest,
    Loading,
    Ready,
    Report,
    Step,
    Submit,
    TokenEvent,
)
from app.llm.engine.process import EngineProcess
from app.llm.tokenizer import PromptTokenizer
from app.utils.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineUnavailableError,
    InternalError,
    ModelLoadingError,
    OverloadedError,
    ServiceError,
)

log = get_logger("engine")

# An engine that dies this often without ever having been ready is not going to be.
_MAX_FAILED_STARTS = 3
_RESTART_DELAYS = (0.0, 1.0, 5.0)
# Throughput is measured over the requests that ended within this many seconds.
_THROUGHPUT_WINDOW = 60.0
_MAX_RETRY_AFTER = 60.0
_LOADING_RETRY_AFTER = 5.0


class EngineState(StrEnum):
    """Where the engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """How full the engine is, for /status."""

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


class Admission:
    """A place among the running and waiting requests, held until :meth:`release`."""

    def __init__(self, client: "EngineClient", timeout: float) -> None:
        self._client = client
        self._mailbox = _Mailbox()
        self._admitted_at = time.perf_counter()
        self._turn: asyncio.Future[None] | None = None
        self._request: GenerationRequest | None = None
        self._released = False
        self._timer = asyncio.get_running_loop().call_later(
            timeout, self.fail, DeadlineExceededError()
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Run ``request`` and yield its events; the last one has a finish reason.

        Raises:
            DeadlineExceededError: The request took too long.
            EngineUnavailableError: The engine process died.
            DrainingError: The service is shutting down.
            InternalError: This request failed inside the engine.
        """
        try:
            await self._wait_for_turn()
            self._request = request
            self._client._submit(self, request)
            meter = _Meter(self._client._metrics, self._client.model_label, self._admitted_at)
            meter.started(len(request.prompt_token_ids))
            while True:
                for event in await self._mailbox.take():
                    meter.observe(event)
                    if event.finish_reason == "error":
                        raise InternalError
                    yield event
                    if event.finish_reason is not None:
                        self._request = None
                        return
        finally:
            self.release()

    async def _wait_for_turn(self) -> None:
        self._turn = self._client._queue_up()
        await self._turn

    def fail(self, error: ServiceError) -> None:
        """End the request with ``error``, wherever it is."""
        if self._turn is not None and not self._turn.done():
            self._turn.set_exception(error)
        self._mailbox.fail(error)
        self._client._abandon(self._request)
        self._request = None

    def deliver(self, event: TokenEvent) -> None:
        """Take an event from the engine."""
        self._mailbox.put(event)

    def release(self) -> None:
        """Give the place back; cancels the request if it has not ended. May be called twice."""
        if self._released:
            return
        self._released = True
        self._timer.cancel()
        self._client._leave(self, self._turn, self._request)


class _Meter:
    """Observes one request's timings."""

    def __init__(self, metrics: Metrics, model: str, admitted_at: float) -> None:
        self._metrics = metrics
        self._model = model
        self._admitted_at = admitted_at
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
            metrics.request_duration.labels(event.finish_reason).observe(now - self._admitted_at)


class EngineClient:
    """Starts the engine process, keeps it running, and shares it between requests."""

    def __init__(
        self,
        *,
        model: ModelSettings,
        model_label: str,
        engine: EngineSettings,
        logging: LoggingSettings,
        huggingface_token: str | None,
        metrics: Metrics,
        on_fatal: Callable[[str], None],
    ) -> None:
        """Nothing starts before :meth:`start`.

        Args:
            model: Which model to load.
            model_label: Name callers see, also before the model is loaded.
            engine: Limits.
            logging: How the engine process is to log.
            huggingface_token: For gated models.
            metrics: Where timings go.
            on_fatal: Called with one line when the engine cannot run and will not be retried.
        """
        self.model_label = model_label
        self.state = EngineState.LOADING
        self.info: EngineInfo | None = None
        self.tokenizer: PromptTokenizer | None = None
        self.stats = EngineStats()
        self.loading_message = "starting the engine process"
        self.restarts = 0
        self._limits = engine
        self._metrics = metrics
        self._on_fatal = on_fatal
        self._configure = Configure(
            model=model.model_dump(),
            max_running=engine.max_running,
            echo_step_seconds=engine.echo_step_seconds,
            huggingface_token=huggingface_token,
            log_level=logging.level,
            log_format=logging.format,
        )
        self._process: EngineProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._admissions: set[Admission] = set()
        self._turns: deque[asyncio.Future[None]] = deque()
        self._running = 0
        self._by_request: dict[str, Admission] = {}
        self._finished_at: deque[float] = deque(maxlen=1000)

    # --- life ------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin loading; returns at once."""
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def stop(self) -> None:
        """End the engine process; running requests end with an error."""
        self.state = EngineState.STOPPED
        self._fail_all(DrainingError())
        if self._process is not None:
            await self._process.stop()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self.tokenizer is not None:
            self.tokenizer.close()

    def drain(self) -> None:
        """Take no new requests; running ones go on."""
        self.state = EngineState.DRAINING

    def abort_running(self) -> None:
        """End every admitted request with an error."""
        self._fail_all(DrainingError())

    async def _supervise(self) -> None:
        failed_starts = 0
        while True:
            try:
                was_ready, ending = await self._run_once()
            except asyncio.CancelledError:
                if self._process is not None:
                    self._process.kill()
                raise
            if self.state in (EngineState.STOPPED, EngineState.FAILED):
                return
            self._fail_all(EngineUnavailableError())
            failed_starts = 0 if was_ready else failed_starts + 1
            log.error("the engine process ended: %s", ending, extra={"ready": was_ready})
            if failed_starts >= _MAX_FAILED_STARTS:
                self._give_up(
                    f"the engine process died {failed_starts} times while loading: {ending}"
                )
                return
            if self.state is not EngineState.DRAINING:
                self.state = EngineState.RESTARTING
            self.restarts += 1
            self._metrics.engine_restarts.inc()
            await asyncio.sleep(_RESTART_DELAYS[min(failed_starts, len(_RESTART_DELAYS) - 1)])

    async def _run_once(self) -> tuple[bool, str]:
        """One life of the engine process: whether it became ready, and how it ended."""
        process = self._process = await EngineProcess.start()
        log.info("engine process started", extra={"pid": process.pid})
        process.send(self._configure)
        ready = False
        async for report in process.reports():
            ready = ready or isinstance(report, Ready)
            await self._handle(report)
        ending = await process.wait()
        self._process = None
        return ready, ending

    async def _handle(self, report: Report) -> None:
        if isinstance(report, Step):
            self._dispatch(report)
        elif isinstance(report, Loading):
            self.loading_message = report.message
            log.info(report.message)
        elif isinstance(report, Ready):
            await self._become_ready(report.info)
        else:
            self._give_up(report.message)

    async def _become_ready(self, info: EngineInfo) -> None:
        if self.tokenizer is None or info != self.info:
            # A large vocabulary takes seconds to parse.
            self.tokenizer = await asyncio.to_thread(PromptTokenizer, info)
        self.info = info
        self._metrics.model_info.clear()
        self._metrics.model_info.labels(info.model, info.backend, info.device, info.dtype).set(1)
        if self.state is not EngineState.DRAINING:
            self.state = EngineState.READY
        log.info(
            "model ready",
            extra={
                "model": info.model,
                "engine": info.backend,
                "engine_reason": info.backend_reason,
                "device": info.device,
                "dtype": info.dtype,
                "context_length": info.context_length,
            },
        )

    def _give_up(self, message: str) -> None:
        self.state = EngineState.FAILED
        self._fail_all(EngineUnavailableError())
        self._on_fatal(message)

    # --- requests --------------------------------------------------------------------------

    def admit(self) -> Admission:
        """Take a place, or be refused at once, before any work is spent.

        Raises:
            ModelLoadingError: The model is not loaded yet.
            EngineUnavailableError: The engine died and is being started again.
            DrainingError: The service is shutting down.
            OverloadedError: Every place is taken.
        """
        try:
            self._check_can_admit()
        except ServiceError as error:
            self._metrics.rejected.labels(error.code).inc()
            raise
        admission = Admission(self, self._limits.request_timeout_seconds)
        self._admissions.add(admission)
        self._show_queue()
        return admission

    def _check_can_admit(self) -> None:
        if self.state in (EngineState.DRAINING, EngineState.STOPPED):
            raise DrainingError(retry_after=_LOADING_RETRY_AFTER)
        if self.state is EngineState.LOADING:
            raise ModelLoadingError(retry_after=_LOADING_RETRY_AFTER)
        if self.state is not EngineState.READY:
            raise EngineUnavailableError(retry_after=_LOADING_RETRY_AFTER)
        if len(self._admissions) >= self._limits.max_running + self._limits.max_waiting:
            raise OverloadedError(retry_after=self._seconds_until_room())

    def _seconds_until_room(self) -> float:
        """Time in which the waiting requests will have been served, from measured throughput."""
        now = time.monotonic()
        recent = [t for t in self._finished_at if now - t <= _THROUGHPUT_WINDOW]
        if not recent:
            return _LOADING_RETRY_AFTER
        rate = len(recent) / max(now - recent[0], 1.0)
        waiting = len(self._admissions) - self._running
        return min((waiting + 1) / rate, _MAX_RETRY_AFTER)

    def queue(self) -> QueueSnapshot:
        """How full the engine is."""
        return QueueSnapshot(
            running=self._running,
            waiting=len(self._admissions) - self._running,
            max_running=self._limits.max_running,
            max_waiting=self._limits.max_waiting,
        )

    def _queue_up(self) -> asyncio.Future[None]:
        turn = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        self._next_turns()
        return turn

    def _next_turns(self) -> None:
        while self._turns and self._running < self._limits.max_running:
            turn = self._turns.popleft()
            if not turn.done():
                self._running += 1
                turn.set_result(None)
        self._show_queue()

    def _submit(self, admission: Admission, request: GenerationRequest) -> None:
        self._by_request[request.id] = admission
        if self._process is None or self.state not in (EngineState.READY, EngineState.DRAINING):
            raise EngineUnavailableError(retry_after=_LOADING_RETRY_AFTER)
        self._process.send(Submit(request=request))

    def _dispatch(self, step: Step) -> None:
        self.stats = step.stats
        self._metrics.kv_cache_usage.set(step.stats.kv_cache_usage)
        for event in step.events:
            admission = self._by_request.get(event.request_id)
            if admission is None:
                # It has left, and the engine had not heard of it when this step began.
                continue
            if event.finish_reason is not None:
                del self._by_request[event.request_id]
            if event.error:
                log.error(
                    "a request failed in the engine",
                    extra={"engine_request": event.request_id, "reason": event.error},
                )
            admission.deliver(event)

    def _abandon(self, request: GenerationRequest | None) -> None:
        """Stop the engine's work for a request that has not ended."""
        if (
            request is not None
            and self._by_request.pop(request.id, None) is not None
            and self._process
        ):
            self._process.send(Cancel(request_id=request.id))

    def _leave(
        self,
        admission: Admission,
        turn: asyncio.Future[None] | None,
        request: GenerationRequest | None,
    ) -> None:
        self._admissions.discard(admission)
        if request is not None:
            self._metrics.cancelled.inc()
            self._abandon(request)
        else:
            self._finished_at.append(time.monotonic())
        if turn is not None:
            had_turn = turn.done() and not turn.cancelled() and turn.exception() is None
            turn.cancel()
            if had_turn:
                self._running -= 1
        self._next_turns()

    def _fail_all(self, error: ServiceError) -> None:
        for admission in list(self._admissions):
            admission.fail(error)

    def _show_queue(self) -> None:
        self._metrics.running.set(self._running)
        self._metrics.waiting.set(len(self._admissions) - self._running)
