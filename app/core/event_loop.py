"""Metrics of the event loop: how late its timers fire, and how many tasks it has."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from app.core.metrics import Metrics

SAMPLE_SECONDS = 0.25


@asynccontextmanager
async def event_loop_measured(metrics: Metrics) -> AsyncIterator[None]:
    """Inside it a timer is set every :data:`SAMPLE_SECONDS`, and its delay observed.

    Every request waits that long too. A block of the loop that is longer than the time between two
    samples is always observed; a shorter one with a probability of its length divided by that time.
    """
    task = asyncio.create_task(_measure(metrics), name="event-loop-monitor")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _measure(metrics: Metrics) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + SAMPLE_SECONDS
        await asyncio.sleep(SAMPLE_SECONDS)
        # A timer may fire early by up to the resolution of the loop's clock.
        metrics.event_loop_lag.observe(max(loop.time() - due, 0.0))
        metrics.event_loop_tasks.set(len(asyncio.all_tasks(loop)))
