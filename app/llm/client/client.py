"""The API process's side of the engine: starts the process, keeps it running, and talks to it.

A request is admitted or refused before any work is spent on it, it waits for a slot, and its events
are read until the last. When its caller leaves, what it held is free before the engine's next step.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from app.core.config import ModelSettings
from app.core.config.engine import EngineSettings
from app.core.config.logging import LoggingSettings
from app.core.logging import get_logger
from app.core.metrics import Metrics
from app.llm.client.admission import RequestQueue
from app.llm.client.place import Place, PlaceListener
from app.llm.client.process import EngineProcess, engine_python
from app.llm.client.restarts import Restarts
from app.llm.client.retries import InFlight
from app.llm.client.stage import Stage
from app.llm.client.watchdog import LOOK_SECONDS, Duty, Watchdog, observe
from app.llm.protocol import (
    Command,
    Configure,
    EngineInfo,
    EngineStats,
    Loaded,
    Loading,
    Ready,
    Report,
    Step,
)
from app.llm.tokenizer import PromptTokenizer
from app.utils.errors import DrainingError, EngineUnavailableError, ModelLoadingError, ServiceError
from app.utils.garbage import spare_what_stays

log = get_logger("engine")

_LOADING_RETRY_AFTER = 5.0
# Time to send the last errors before the service exits.
_LAST_ERRORS_SECONDS = 0.5


class EngineState(StrEnum):
    """Whether the engine takes requests, and why not."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"


class EngineClient:
    """Starts the engine process, keeps it running, and shares it between requests.

    Args:
        model_label: Name callers see, also before the model is loaded.
        logging: How the engine process is to log.
        huggingface_token: For gated models.
        on_fatal: Called with one line when the engine cannot run and will not be retried.

    Raises:
        ConfigurationError: The engine's interpreter is not there.

    Attributes:
        info: What is being served; ``None`` before the model is loaded.
        tokenizer: The served model's; ``None`` before the model is loaded.
        stats: The engine's last figures; zeros while there is no engine process.
        stage: What the engine process does before it is ready.
        restarts: How often the engine process has been started again.
        last_end: How the last engine process ended; ``None`` if none did.
        on_ready: Called on a thread whenever an engine process is ready.
    """

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
        self.model_label = model_label
        self.state = EngineState.LOADING
        self.info: EngineInfo | None = None
        self.tokenizer: PromptTokenizer | None = None
        self.stats = EngineStats()
        self.stage = Stage()
        self.restarts = 0
        self.last_end: str | None = None
        self.on_ready: Callable[[], None] = lambda: log.info("ready for requests")
        self.queue = RequestQueue(engine, metrics, model_label)
        metrics.add_engine_process(lambda: self._process.pid if self._process else None)
        self._metrics = metrics
        self._on_fatal = on_fatal
        self._configure = Configure(
            model=model.model_dump(),
            max_running=engine.max_running,
            echo_step_seconds=engine.echo_step_seconds,
            vllm_arguments=engine.vllm_arguments,
            huggingface_token=huggingface_token,
            log_level=logging.level,
            log_format=logging.format,
        )
        self._python = engine_python(model, engine)
        self._limits = engine
        self._restarts = Restarts(engine.max_restarts)
        self._process: EngineProcess | None = None
        self._phase = Duty.LOADING
        self._supervisor: asyncio.Task[None] | None = None
        self._prepare: Callable[[], None] = lambda: None
        self._prepared: asyncio.Task[None] | None = None
        self._describing: asyncio.Task[None] | None = None
        self._in_flight = InFlight(self._send)
        self._patience: asyncio.TimerHandle | None = None

    # --- life ------------------------------------------------------------------------------

    async def start(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Begin loading; returns at once.

        Args:
            prepare: Other work to be done before requests are taken, imports for example. Called
                once, on a thread, while the engine process loads the model.
        """
        self._prepare, self._prepared = prepare, None
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def stop(self) -> None:
        """End the engine process; running requests end with an error."""
        self.state = EngineState.STOPPED
        self._stop_waiting()
        self.queue.fail_all(DrainingError)
        if self._process is not None:
            await self._process.stop()
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self.tokenizer is not None:
            self.tokenizer.close()

    def drain(self) -> None:
        """Refuse new requests from now on; admitted ones go on."""
        self.state = EngineState.DRAINING

    def abort_running(self) -> None:
        """End every admitted request with an error."""
        self.queue.fail_all(DrainingError)

    def is_draining(self) -> bool:
        """Whether the service finishes its requests before it exits."""
        return self.state is EngineState.DRAINING

    @property
    def is_idle(self) -> bool:
        """Whether no request holds a place."""
        return self.queue.is_empty

    def kill(self) -> None:
        """End the engine process at once; requests are not told."""
        if self._process is not None:
            self._process.kill()

    async def _supervise(self) -> None:
        while self._is_needed():
            try:
                was_ready, ending = await self._run_once()
            except Exception:
                log.exception("the engine process could not be served")
                was_ready, ending = False, "an unexpected error"
            if not self._is_needed():
                return
            self.last_end = ending
            log.error("the engine process ended: %s", ending, extra={"ready": was_ready})
            if hopeless := self._restarts.died(was_ready=was_ready):
                await self._give_up(f"{hopeless}: {ending}")
                return
            self.restarts += 1
            self._metrics.engine_restarts.inc()
            await asyncio.sleep(self._restarts.delay)

    def _is_needed(self) -> bool:
        """Whether there are requests to answer, or may be."""
        if self.is_draining():
            return not self.is_idle
        return self.state not in (EngineState.STOPPED, EngineState.FAILED)

    async def _run_once(self) -> tuple[bool, str]:
        """Run one engine process to its end: whether it became ready, and how it ended."""
        process = self._process = await EngineProcess.start(self._python)
        log.info("engine process started", extra={"pid": process.pid})
        self._phase = Duty.LOADING
        process.send(self._configure)
        if self._prepared is None:
            # The process is started first, since loading takes longer.
            self._prepared = asyncio.create_task(self._run_preparation(), name="preparation")
        ready = False
        watchdog = Watchdog(self._limits)
        watching = asyncio.create_task(self._watch(process, watchdog), name="engine-watchdog")
        try:
            while (report := await process.receive()) is not None:
                watchdog.heard()
                ready = ready or isinstance(report, Ready)
                await self._handle(report)
            self._lose_running()
            ending = await process.wait()
            if not ready and process.last_written:
                # Its environment may be broken. A line from later might quote a request.
                ending = f"{ending} ({process.last_written})"
        except BaseException:
            process.kill()
            self._lose_running()
            raise
        finally:
            watching.cancel()
            if self._describing is not None:
                self._describing.cancel()
            self._process = self._describing = None
        return ready, ending

    async def _watch(self, process: EngineProcess, watchdog: Watchdog) -> None:
        """Kill an engine process that makes no progress; :meth:`_run_once` notices its end."""
        limit = self._limits.load_timeout_seconds
        loading = 0.0
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            # Counted in looks, as the watchdog does.
            loading = loading + LOOK_SECONDS if self._phase is Duty.LOADING else 0.0
            if self._phase is not Duty.NOTHING:
                self.stage.redraw()
            if loading > limit:
                await self._give_up(
                    f"{self.stage.message} took more than {limit:g} s: choose a smaller or "
                    "another model, or raise ENGINE__LOAD_TIMEOUT_SECONDS"
                )
                return
            activity = await asyncio.to_thread(observe, process.pid)
            if fault := watchdog.look(self._duty, activity):
                process.kill(f"killed, since {fault}")
                return

    @property
    def _duty(self) -> Duty:
        """What the engine process is expected to do now."""
        return Duty.GENERATING if self._in_flight.engine_is_asked else self._phase

    async def _handle(self, report: Report) -> None:
        if isinstance(report, Step):
            self._set_stats(report.stats)
            if report.log_dropped:
                self._metrics.log_dropped.labels("engine").inc(report.log_dropped)
            self._in_flight.dispatch(report)
        elif isinstance(report, Loading):
            self._phase = Duty.FETCHING if report.fetching else Duty.LOADING
            self.stage.reported(report.message, report.percent)
        elif isinstance(report, Loaded):
            # A task: until Ready is read, the watchdog takes an idle process for a stalled one.
            self._describing = asyncio.create_task(self._describe(report.info), name="description")
        elif isinstance(report, Ready):
            self._phase = Duty.NOTHING
            if self._describing is not None:
                await self._describing
            self._serve()
            await asyncio.to_thread(self.on_ready)
        else:
            await self._give_up(report.message)

    async def _describe(self, info: EngineInfo) -> None:
        if self._prepared is not None:
            # It runs once, and goes on if this engine process dies.
            await asyncio.shield(self._prepared)
        if self.tokenizer is None or info != self.info:
            # A large vocabulary takes seconds to parse.
            self.tokenizer = await asyncio.to_thread(PromptTokenizer, info)
            if not self.tokenizer.frames_turns:
                log.warning(
                    "the chat template frames turns in plain text: a message can imitate a turn"
                )
            spare_what_stays()
        self.info = info
        self._metrics.model_info.clear()
        self._metrics.model_info.labels(info.model, info.backend, info.device, info.dtype).set(1)
        log.info(
            "model loaded",
            extra={
                "model": info.model,
                "engine": info.backend,
                "engine_reason": info.backend_reason,
                "device": info.device,
                "dtype": info.dtype,
                "context_length": info.context_length,
            },
        )

    async def _run_preparation(self) -> None:
        try:
            await asyncio.to_thread(self._prepare)
        except Exception:
            # A restart of the engine would not repair this.
            log.exception("the service cannot be made ready")
            await self._give_up("the service cannot be made ready; the log above says why")

    def _serve(self) -> None:
        """Take requests, and submit those that the last engine process has left."""
        self._stop_waiting()
        if self.state not in (EngineState.DRAINING, EngineState.FAILED):
            self.state = EngineState.READY
        self._in_flight.engine_started()

    def _lose_running(self) -> None:
        """The engine process is gone; requests wait for the next one for a limited time."""
        if self.state is EngineState.READY:
            self.state = EngineState.RESTARTING
        self._set_stats(EngineStats())
        self._in_flight.engine_died()
        if self._patience is None and not self.queue.is_empty:
            self._patience = asyncio.get_running_loop().call_later(
                self._limits.queue_timeout_seconds, self.queue.fail_all, EngineUnavailableError
            )

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    async def _give_up(self, message: str) -> None:
        self.state = EngineState.FAILED
        self.queue.fail_all(EngineUnavailableError)
        await asyncio.sleep(_LAST_ERRORS_SECONDS)
        self._on_fatal(message)

    @property
    def template_tokens(self) -> tuple[str, ...]:
        """Texts of the special tokens around messages; none before the model is loaded."""
        return self.tokenizer.template_tokens if self.tokenizer is not None else ()

    # --- requests --------------------------------------------------------------------------

    def admit(self, caller: str = "", listener: PlaceListener | None = None) -> Place:
        """Take a place, or be refused before any work is spent.

        Args:
            caller: Whose request it is; callers share the engine fairly. The empty name stands
                for this process, for example for a LangChain program in it.
            listener: Told whether the request is accepted.

        Raises:
            ModelLoadingError: The model is not loaded yet.
            EngineUnavailableError: The engine died and is being started again.
            DrainingError: The service is shutting down.
            OverloadedError: No place is free for this caller.
        """
        with self._counting_rejections():
            self._check_state()
            return self.queue.admit(self._in_flight, caller, listener)

    def check(self, caller: str = "") -> None:
        """Refuse what :meth:`admit` would refuse now, without taking a place.

        Raises:
            ServiceError: As :meth:`admit`.
        """
        with self._counting_rejections():
            self._check_state()
            self.queue.check(caller)

    @contextmanager
    def _counting_rejections(self) -> Iterator[None]:
        try:
            yield
        except ServiceError as error:
            self._metrics.rejected.labels(error.code).inc()
            raise

    def _check_state(self) -> None:
        if self.state in (EngineState.DRAINING, EngineState.STOPPED):
            raise DrainingError(retry_after=_LOADING_RETRY_AFTER)
        if self.state is EngineState.LOADING:
            raise ModelLoadingError(retry_after=_LOADING_RETRY_AFTER)
        if self.state is not EngineState.READY:
            raise EngineUnavailableError(retry_after=_LOADING_RETRY_AFTER)

    def _send(self, command: Command) -> None:
        if self._process is not None:
            self._process.send(command)

    def _set_stats(self, stats: EngineStats) -> None:
        self.stats = stats
        self.queue.running = stats.running
        self._metrics.kv_cache_usage.set(stats.kv_cache_usage)
