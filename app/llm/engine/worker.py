"""The engine process: owns the model and advances all running requests step by step.

It is a separate process for two reasons: a step holds the interpreter for tens of milliseconds, and
a crash in native code must end the running requests only, not the service. The main thread owns the
model. A second thread reads commands from the socket, so that a cancellation is known before the
next step, and so that this process ends with its parent.
"""

import argparse
import contextlib
import gc
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from app.core.config import ModelSettings
from app.core.config.logging import LoggingSettings
from app.core.logging import configure_logging, get_logger
from app.llm.ebnf.errors import GrammarError
from app.llm.loader import load_backend
from app.llm.models.load_errors import one_line
from app.llm.protocol import (
    HEADER_BYTES,
    Backend,
    Cancel,
    Command,
    Configure,
    EngineStats,
    GenerationRequest,
    Loaded,
    LoadFailed,
    Loading,
    Message,
    Ready,
    Step,
    Stop,
    Submit,
    TokenEvent,
    body_length,
    pack,
    unpack_command,
)
from app.utils.errors import ModelLoadError
from app.utils.garbage import no_collections, spare_what_stays
from app.utils.parent import end_with_parent

log = get_logger("engine")

# A long prompt takes many steps without events. The service hears this often that they go on.
_REPORT_SECONDS = 1.0
# Characters of an exception's message in the log.
_MAX_MESSAGE = 300


class Channel:
    """The worker's end of the socket, and a queue of the commands that have come."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._reader = sock.makefile("rb")
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def start_reading(self) -> None:
        """Read commands on another thread, which ends this process when the peer is gone."""
        threading.Thread(target=self._read_commands, name="commands", daemon=True).start()

    def _read_commands(self) -> None:
        status = 1
        try:
            while (command := self.receive()) is not None and not isinstance(command, Stop):
                self.commands.put(command)
            status = 0
        except Exception:
            # Out of memory, for example. An engine that gets no commands is of no use.
            log.exception("commands can no longer be read")
        finally:
            # The service is gone or has sent Stop. The main thread may be in native code or in a
            # download, where nothing else would end the process for certain.
            _exit(status)

    def send(self, message: Message) -> None:
        """Send one message; blocks while the peer is slow to read."""
        self._socket.sendall(pack(message))

    def receive(self) -> Command | None:
        """Wait for one command; ``None`` when the peer is gone."""
        with contextlib.suppress(ConnectionError):
            header = self._reader.read(HEADER_BYTES)
            if len(header) == HEADER_BYTES:
                length = body_length(header)
                body = self._reader.read(length)
                if len(body) == length:
                    return unpack_command(body)
        return None


class Worker:
    """The loop between the socket and the backend.

    Args:
        max_running: Slots: most requests that the backend has at once. Others wait here, so that a
            slot that one step frees is filled before the next step.
        take_dropped: How many lines of the log were lost since the last call.
    """

    def __init__(
        self,
        channel: Channel,
        backend: Backend,
        max_running: int,
        take_dropped: Callable[[], int] = lambda: 0,
    ) -> None:
        self._channel = channel
        self._take_dropped = take_dropped
        self._backend = backend
        self._max_running = max_running
        self._running: set[str] = set()
        self._waiting: dict[str, GenerationRequest] = {}
        self._reported_stats = EngineStats()
        self._reported_at = time.monotonic()

    def run(self) -> None:
        """Serve for ever; the thread that reads commands ends the process."""
        while True:
            events: list[TokenEvent] = []
            self._take_commands(events)
            if started := self._fill_slots(events):
                # A step may take long, so the service hears before it which requests run.
                self._report(events, started)
                events = []
            if self._backend.has_work():
                events += self._backend.step()
            self._report(events)

    def _take_commands(self, events: list[TokenEvent]) -> None:
        """Carry out every command that has come; wait for one if there is nothing to do."""
        block = not (self._waiting or self._backend.has_work())
        while True:
            try:
                command = self._channel.commands.get(block=block)
            except queue.Empty:
                break
            block = False
            if isinstance(command, Submit):
                self._waiting[command.request.id] = command.request
            elif isinstance(command, Cancel):
                self._cancel(command.request_id, events)

    def _fill_slots(self, events: list[TokenEvent]) -> list[str]:
        """Start requests that wait while slots are free; returns their ids."""
        started = []
        while self._waiting and len(self._running) < self._max_running:
            request = self._waiting.pop(next(iter(self._waiting)))
            if self._start(request, events):
                started.append(request.id)
        return started

    def _start(self, request: GenerationRequest, events: list[TokenEvent]) -> bool:
        try:
            self._check(request)
            self._backend.add(request)
        except MemoryError:
            # It says nothing about this request, and the next one would most likely fail too.
            raise
        except Exception as error:
            log.exception("a request could not be added", extra={"engine_request": request.id})
            # The exception's message may contain what the caller sent, a grammar for example.
            name, refused = type(error).__name__, isinstance(error, GrammarError)
            events.append(
                TokenEvent(request.id, finish_reason="error", error=name, refused=refused)
            )
            return False
        self._running.add(request.id)
        return True

    def _check(self, request: GenerationRequest) -> None:
        """Refuse tokens outside the vocabulary; native code would read past the embeddings."""
        size = self._backend.info.vocabulary_size
        ids = [*request.prompt_token_ids, *request.sampling.logit_bias]
        if not request.prompt_token_ids or min(ids) < 0 or max(ids) >= size:
            raise ValueError(f"the prompt is empty, or a token is outside the vocabulary of {size}")

    def _cancel(self, request_id: str, events: list[TokenEvent]) -> None:
        if request_id in self._running:
            self._backend.cancel(request_id)
            self._running.remove(request_id)
        elif self._waiting.pop(request_id, None) is None:
            return
        events.append(TokenEvent(request_id=request_id, finish_reason="cancelled"))

    def _report(self, events: list[TokenEvent], started: Sequence[str] = ()) -> None:
        for event in events:
            if event.finish_reason is not None:
                self._running.discard(event.request_id)
        stats = self._backend.stats()
        now = time.monotonic()
        # The pages of a cancelled request are freed in a step that may have no events.
        is_due = now - self._reported_at >= _REPORT_SECONDS
        dropped = self._take_dropped()
        if events or started or dropped or stats != self._reported_stats or is_due:
            self._reported_stats = stats
            self._reported_at = now
            report = Step(events=events, stats=stats, started=[*started], log_dropped=dropped)
            self._channel.send(report)


def _load(channel: Channel, configure: Configure) -> Backend | None:
    try:
        return load_backend(
            ModelSettings.model_validate(configure.model),
            max_running=configure.max_running,
            echo_step_seconds=configure.echo_step_seconds,
            vllm_arguments=configure.vllm_arguments,
            token=configure.huggingface_token,
            progress=lambda message, percent=None: channel.send(
                Loading(message=message, percent=percent)
            ),
            fetch_progress=lambda message, percent=None: channel.send(
                Loading(message=message, fetching=True, percent=percent)
            ),
            loaded=lambda info: channel.send(Loaded(info=info)),
        )
    except ModelLoadError as error:
        channel.send(LoadFailed(message=str(error)))
    except Exception as error:
        log.exception("loading the model failed")
        reason = one_line(error)[:_MAX_MESSAGE]
        channel.send(LoadFailed(message=f"the model cannot be loaded: {reason or repr(error)}"))
    return None


def main() -> int:
    """Entry point: ``python -m app.llm.engine.worker FD LOG``; the parent holds the other end."""
    # When the service is killed, the thread that reads the socket ends this process; where this
    # process is stopped or stuck, the kernel does it.
    end_with_parent()
    parser = argparse.ArgumentParser(description="The engine process; started by the service.")
    parser.add_argument("fd", type=int, help="file descriptor of the socket to the service")
    parser.add_argument("log", type=int, help="file descriptor of the log")
    arguments = parser.parse_args()
    channel = Channel(socket.socket(fileno=arguments.fd))
    configure = channel.receive()
    if not isinstance(configure, Configure):
        return 1
    log_lines = configure_logging(
        LoggingSettings.model_validate(
            {"level": configure.log_level, "format": configure.log_format}
        ),
        # Libraries write to standard error, so the log has its own descriptor.
        descriptor=arguments.log,
    )
    channel.start_reading()
    with no_collections():
        backend = _load(channel, configure)
    if backend is None:
        return 1
    # Loading may have left a second copy of the weights.
    gc.collect()
    spare_what_stays()
    try:
        channel.send(Ready())
        Worker(channel, backend, configure.max_running, log_lines.take_dropped).run()
    except Exception as error:
        # Backends handle the errors of single requests. After any other error the model or its
        # cache may be broken, so the process ends and the client starts another. The message is
        # about memory or a device, not about a request, and tracebacks in the log have none.
        log.exception("an engine step failed: %s", one_line(error)[:_MAX_MESSAGE])  # noqa: TRY401 - see above
    return 1


def _exit(status: int) -> NoReturn:
    """End the process with its last log lines, and without waiting for native threads."""
    logging.shutdown()
    os._exit(status)


if __name__ == "__main__":
    _exit(main())
if __name__ == "__mp_main__":
    # vLLM's helper processes import this module first. Each ends with the engine process, also when
    # it is stopped or stuck.
    end_with_parent()
