"""Measures the event loop: how late it is, which every request on it waits, and how full."""

import asyncio
from types import TracebackType
from typing import Self

from app.core.metrics import Metrics

SAMPLE_SECONDS = 0.25


class EventLoopMonitor:
    """Sets itself a timer a few times a second, and observes how late each one fires.

    A blocked loop is seen in full where it is blocked for longer than the time between two
    samples, and by its share of the time where it is blocked for less.
    """

    def __init__(self, metrics: Metrics) -> None:
        """Nothing is measured before the context is entered."""
        self._lag = metrics.event_loop_lag
        self._tasks = metrics.event_loop_tasks
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin to measure the running loop."""
        self._task = asyncio.create_task(self._measure(), name="event-loop-monitor")
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Measure no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _measure(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + SAMPLE_SECONDS
            await asyncio.sleep(SAMPLE_SECONDS)
            # The loop fires a timer early by up to its clock's resolution.
            self._lag.observe(max(loop.time() - due, 0.0))
            self._tasks.set(len(asyncio.all_tasks(loop)))
