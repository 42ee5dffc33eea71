"""Metrics of the event loop: how late its timers fire, and how many tasks it has."""

import asyncio
from types import TracebackType
from typing import Self

from app.core.metrics import Metrics

SAMPLE_SECONDS = 0.25


class EventLoopMonitor:
    """Sets a timer every :data:`SAMPLE_SECONDS`, and observes how late it fires.

    Every request waits that long too. A block of the loop that is longer than the time between two
    samples is always observed; a shorter one with a probability of its length divided by that time.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._lag = metrics.event_loop_lag
        self._tasks = metrics.event_loop_tasks
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Start measuring the running loop."""
        self._task = asyncio.create_task(self._measure(), name="event-loop-monitor")
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Stop measuring."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _measure(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + SAMPLE_SECONDS
            await asyncio.sleep(SAMPLE_SECONDS)
            # A timer may fire early by up to the resolution of the loop's clock.
            self._lag.observe(max(loop.time() - due, 0.0))
            self._tasks.set(len(asyncio.all_tasks(loop)))
