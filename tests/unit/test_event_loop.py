"""The event loop is measured while the application runs, and only then."""

import asyncio
import time

from app.core.event_loop import SAMPLE_SECONDS, event_loop_measured
from app.core.metrics import Metrics
from tests.support.application import make_app


def value(metrics: Metrics, part: str) -> float:
    """A part of the histogram: ``count``, ``sum``."""
    return metrics.registry.get_sample_value(f"event_loop_lag_seconds_{part}") or 0.0


async def samples(metrics: Metrics, more: int) -> None:
    """Wait for so many more samples."""
    enough = value(metrics, "count") + more
    async with asyncio.timeout(10):
        while value(metrics, "count") < enough:  # noqa: ASYNC110 - a counter has no event
            await asyncio.sleep(0.01)


def monitors() -> list[str]:
    """The monitor's tasks."""
    return [t.get_name() for t in asyncio.all_tasks() if t.get_name() == "event-loop-monitor"]


async def test_a_blocked_loop_is_seen() -> None:
    """A loop that is held for a second is late for the sample that was due in that time."""
    metrics = Metrics()
    async with event_loop_measured(metrics):
        await samples(metrics, 1)
        before = value(metrics, "sum")
        time.sleep(1.0)  # noqa: ASYNC251 - what is measured
        await samples(metrics, 1)
        assert value(metrics, "sum") - before >= 1.0 - SAMPLE_SECONDS
    count = value(metrics, "count")
    await asyncio.sleep(2 * SAMPLE_SECONDS)
    assert value(metrics, "count") == count
    assert monitors() == []


async def test_tasks_are_counted() -> None:
    """The gauge has every task of the loop, the monitor's own included, and falls again."""
    metrics = Metrics()

    def counted() -> float | None:
        return metrics.registry.get_sample_value("event_loop_tasks")

    async with event_loop_measured(metrics):
        await samples(metrics, 1)
        before = counted()
        sleepers = [asyncio.create_task(asyncio.sleep(60)) for _ in range(5)]
        await samples(metrics, 2)
        assert counted() == len(asyncio.all_tasks()) == (before or 0) + 5
        for sleeper in sleepers:
            sleeper.cancel()
        await asyncio.gather(*sleepers, return_exceptions=True)
        await samples(metrics, 2)
        assert counted() == before


async def test_the_application_measures_from_start_to_stop() -> None:
    """The lifespan starts the measurement and ends it."""
    app = make_app()
    metrics = app.state.services.metrics
    async with app.router.lifespan_context(app):
        assert len(monitors()) == 1
        await samples(metrics, 2)
    assert monitors() == []
