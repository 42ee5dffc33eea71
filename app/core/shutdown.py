"""Graceful shutdown: what happens between the first signal and the exit.

uvicorn would close its listener at the first signal, wait for its connections without a limit, and
raise the signal again. Here the listener stays open until the work is done, so that a balancer gets
503 and not a closed port. Then uvicorn is told to stop, and the process exits with 0.
"""

import asyncio
import contextvars
import os
import signal
from types import FrameType
from typing import Any, Protocol, Self

import uvicorn

from app.core.config import AppSettings
from app.core.logging import get_logger

log = get_logger()

_POLL_SECONDS = 0.05
# Time to send the last errors before exit.
_LAST_BYTES_SECONDS = 1.0


class Drainable(Protocol):
    """Something that finishes its work before the exit."""

    @property
    def is_idle(self) -> bool:
        """Whether no work is left."""

    def drain(self) -> None:
        """Take no new work."""

    def abort_running(self) -> None:
        """End the work that is left with an error."""

    def kill(self) -> None:
        """End at once every process that would outlive this one."""


class GracefulShutdown:
    """Drains at SIGTERM or SIGINT, and ends at once at a second one.

    The context is entered inside the lifespan, when uvicorn has installed its own handlers. Where
    these have had a signal, uvicorn ends after the start, and no work begins. Outside of the main
    thread, as in tests, it handles no signals.

    Args:
        work: What is drained.
        settings: How long that may take.
    """

    def __init__(self, work: Drainable, settings: AppSettings) -> None:
        self._work = work
        self._grace = settings.shutdown_grace_seconds
        self._notice = min(settings.shutdown_notice_seconds, self._grace)
        self._previous: dict[signal.Signals, Any] = {}
        self._draining: asyncio.Task[None] | None = None
        self._signalled = False

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            previous = signal.getsignal(number)
            try:
                signal.signal(number, self._on_signal)
            except ValueError:
                # Not the main thread.
                break
            self._previous[number] = previous
            server = _server_of(previous)
            if server is not None and server.should_exit:
                self._work.drain()
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._signalled:
            self._work.kill()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            # The first process of a container does not die of a signal's default action.
            os._exit(128 + number)
        self._signalled = True
        # A signal interrupts any task; the shutdown belongs to no request.
        nobody = contextvars.Context()
        self._loop.call_soon_threadsafe(self._begin, signal.Signals(number), context=nobody)

    def _begin(self, number: signal.Signals) -> None:
        log.info("draining: no new requests; running ones have %.0f s", self._grace)
        self._work.drain()
        self._draining = self._loop.create_task(self._drain(number), name="drain")

    async def _drain(self, number: signal.Signals) -> None:
        began = self._loop.time()
        passed = 0.0
        while self._goes_on(passed):
            await asyncio.sleep(_POLL_SECONDS)
            passed = self._loop.time() - began
        self._work.abort_running()
        self._leave(number, self._grace - passed)

    def _goes_on(self, passed: float) -> bool:
        return passed < self._notice or (passed < self._grace and not self._work.is_idle)

    def _leave(self, number: signal.Signals, seconds_left: float) -> None:
        """Have the server close its remaining connections and return."""
        previous = self._previous[number]
        server = _server_of(previous)
        if server is not None:
            # uvicorn's own handler would raise the signal again at the end.
            server.should_exit = True
            # The annotation says int, but uvicorn takes any number of seconds.
            config: Any = server.config
            if config.timeout_graceful_shutdown is None:
                config.timeout_graceful_shutdown = max(seconds_left, 0.0) + _LAST_BYTES_SECONDS
        else:
            signal.signal(number, previous)
            signal.raise_signal(number)


def _server_of(handler: Any) -> uvicorn.Server | None:
    """The server that handles a signal by one of its methods."""
    server = getattr(handler, "__self__", None)
    return server if isinstance(server, uvicorn.Server) else None
