"""Retry-After: when a place will be free, against when it is, by a clock that the test moves."""

import heapq
import random
from collections.abc import Callable
from statistics import mean

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from app.llm.engine.departures import Departures
from app.utils.errors import OverloadedError
from tests.support.queue import Clock, ManualEngine


class BusyEngine:
    """Turns that are all taken, each by the next request as soon as it ends."""

    def __init__(self, phases: list[float], length: Callable[[], float]) -> None:
        self.clock = Clock()
        self.departures = Departures(len(phases), self.clock)
        self.length = length
        self.ends: list[tuple[float, int]] = []
        self.number = 0
        for phase in sorted(phases):
            self.clock.now = 5000.0 + phase
            self._begin()

    def _begin(self) -> None:
        self.number += 1
        self.departures.start(self.number)
        heapq.heappush(self.ends, (self.clock.now + self.length(), self.number))

    def run(self, until: float) -> None:
        """Let requests end and others begin."""
        while self.ends[0][0] <= until:
            self.clock.now, key = heapq.heappop(self.ends)
            self.departures.end(key, served=True)
            self._begin()
        self.clock.now = until

    def true_seconds(self, place: int) -> float:
        """Time until so many turns will have ended."""
        ends = list(self.ends)
        for _ in range(place - 1):
            now, key = heapq.heappop(ends)
            heapq.heappush(ends, (now + self.length(), key))
        return ends[0][0] - self.clock.now


@given(
    seconds=st.floats(0.05, 60),
    phases=st.lists(st.floats(0, 0.999), min_size=1, max_size=32),
    moment=st.floats(1.5, 20),
    place=st.integers(1, 100),
)
def test_under_steady_service_the_time_told_is_the_true_one(
    seconds: float, phases: list[float], moment: float, place: int
) -> None:
    """Whatever the phases of the running requests, alike or spread.

    It is never earlier than the true time, and later only by the floor: half of the time that
    so many turns take at the mean rate.
    """
    engine = BusyEngine([phase * seconds for phase in phases], lambda: seconds)
    engine.run(5000.0 + (1 + moment) * seconds)
    # A turn at its very end may count as overdue.
    assume(engine.true_seconds(1) > 1e-6 * seconds)
    true = engine.true_seconds(place)
    told = engine.departures.seconds_until(place)
    floor = place * seconds / len(phases) / 2
    assert told == pytest.approx(max(true, floor), abs=1e-5 * seconds)
    assert told <= max(2 * true, floor) + 1e-5 * seconds


@pytest.mark.parametrize(
    "length",
    [
        pytest.param(lambda r: r.expovariate(0.5), id="exponential"),
        pytest.param(lambda r: r.uniform(0.5, 3.5), id="uniform"),
        pytest.param(lambda r: 0.5 if r.random() < 0.8 else 8.0, id="short and long"),
    ],
)
@pytest.mark.parametrize("place", [1, 2, 8, 24])
def test_where_requests_differ_in_length_the_mean_is_within_a_factor_of_two(
    length: Callable[[random.Random], float], place: int
) -> None:
    """The time told, averaged over many moments, against the true time; from fixed seeds."""
    rng = random.Random(7)
    engine = BusyEngine([0.1 * i for i in range(8)], lambda: length(rng))
    told, true = [], []
    for moment in range(1, 400):
        engine.run(5100.0 + moment)
        told.append(engine.departures.seconds_until(place))
        true.append(engine.true_seconds(place))
    assert 0.5 <= mean(told) / mean(true) <= 2


async def fill(engine: ManualEngine, number: int) -> list[str]:
    """Admit so many requests of as many callers."""
    return [await engine.ask(f"caller {len(engine.tasks)}") for _ in range(number)]


async def refused(engine: ManualEngine) -> int:
    """What one more caller is told."""
    with pytest.raises(OverloadedError) as refusal:
        await engine.ask("one more")
    assert refusal.value.headers["Retry-After"] == str(refusal.value.retry_after)
    return refusal.value.retry_after


async def serve(engine: ManualEngine, requests: int, seconds: float) -> None:
    """Serve so many requests, one at a time."""
    for _ in range(requests):
        name = await engine.ask("served")
        engine.clock.now += seconds
        await engine.end(name)


async def test_nothing_measured_is_a_guess_that_grows() -> None:
    """Before the first answer: five seconds, or as long as the oldest request has run."""
    engine = ManualEngine(max_running=2, max_waiting=0)
    await fill(engine, 2)
    assert await refused(engine) == 5
    engine.clock.now += 40
    # Both are overdue: one of two that take 40 seconds is expected in 20.
    assert await refused(engine) == 20


async def test_a_queue_that_fills_after_idleness_knows_how_fast_it_was() -> None:
    """The time that nobody asked for anything is no part of the measurement."""
    engine = ManualEngine(max_running=2, max_waiting=4)
    await serve(engine, 20, seconds=6)
    engine.clock.now += 3600
    await fill(engine, 6)
    engine.clock.now += 2
    assert await refused(engine) == 4


async def test_without_waiting_places_the_oldest_running_request_counts() -> None:
    """With max_waiting 0 a place is free when the first of the running requests ends."""
    engine = ManualEngine(max_running=3, max_waiting=0)
    await serve(engine, 5, seconds=30)
    await fill(engine, 1)
    engine.clock.now += 20
    await fill(engine, 2)
    assert await refused(engine) == 10
    engine.clock.now += 4
    assert await refused(engine) == 26  # the second one, behind the one refused before
    engine.clock.now += 100
    assert engine.queue.snapshot().running == 3


@pytest.mark.parametrize("ran", [0.0, 5.0])
async def test_requests_whose_callers_leave_do_not_make_the_service_look_fast(ran: float) -> None:
    """A hundred that leave, at once or before half of the usual time, change nothing."""
    engine = ManualEngine(max_running=1, max_waiting=0)
    await serve(engine, 5, seconds=12)
    for _ in range(100):
        name = await engine.ask("leaves")
        engine.clock.now += ran
        await engine.leave(name)
    await fill(engine, 1)
    assert await refused(engine) == 12


async def test_a_turn_to_longer_requests_is_noticed_before_they_end() -> None:
    """Requests that have run far longer than those before raise the expectation."""
    engine = ManualEngine(max_running=4, max_waiting=4)
    await serve(engine, 4, seconds=1)
    await fill(engine, 8)
    first = await refused(engine)
    engine.clock.now += 50
    assert first == 1
    assert await refused(engine) >= 3


async def test_those_refused_are_sent_back_one_by_one() -> None:
    """Each is told when a place will be free behind those refused before it, and finds it."""
    engine = ManualEngine(max_running=2, max_waiting=2)
    await serve(engine, 5, seconds=10)
    await fill(engine, 4)
    told = [await refused(engine) for _ in range(6)]
    # Two turns end every ten seconds; there are only four places to come back to.
    assert told == [10, 10, 20, 20, 20, 20]
    for seconds in (10, 10):
        engine.clock.now += seconds
        for name in list(engine.running):
            await engine.end(name)
        await fill(engine, 2)
    with pytest.raises(OverloadedError):
        await engine.ask("another")


async def test_promises_are_forgotten_as_they_come_due() -> None:
    """A crowd that was refused and never came back is not held against those who come later."""
    engine = ManualEngine(max_running=2, max_waiting=20)
    await serve(engine, 5, seconds=10)
    await fill(engine, 22)
    told = [await refused(engine) for _ in range(50)]
    assert told[-1] == 60  # 110 seconds for 22 places, but no more than the clients heed
    for _ in range(12):
        engine.clock.now += 10
        for name in list(engine.running):
            await engine.end(name)
        await fill(engine, 2)
    assert await refused(engine) == 10
