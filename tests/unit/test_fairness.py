"""Fairness between callers: exact orders, and what holds in every order of events."""

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.utils.errors import DeadlineExceededError, EngineUnavailableError
from tests.support.queue import ManualEngine


def callers(ids: Sequence[str]) -> str:
    """The callers of these requests, one letter each."""
    return "".join(name[0] for name in ids)


async def serve(engine: ManualEngine) -> str:
    """End the oldest running request until none is left; returns the callers in order."""
    while engine.running:
        await engine.end(next(iter(engine.running)))
    return callers(engine.order)


async def test_one_request_goes_before_a_hundred_of_another_caller() -> None:
    """It is the very next one, and the others stay in their order."""
    engine = ManualEngine(max_running=2, max_waiting=200)
    for _ in range(100):
        await engine.ask("a")
    late = await engine.ask("b")
    assert callers(engine.order) == "aa"
    await engine.end(engine.order[0])
    assert engine.order[2] == late
    assert await serve(engine) == "aab" + "a" * 98
    assert [n for n in engine.order if n != late] == [n for n in engine.tasks if n != late]
    assert engine.is_empty()


async def test_callers_alternate() -> None:
    """With one slot, and three requests of each of three callers."""
    engine = ManualEngine(max_running=1)
    for caller in "aaabbbccc":
        await engine.ask(caller)
    assert await serve(engine) == "abcabcabc"


async def test_slots_are_shared_evenly() -> None:
    """Each of two callers comes to have two of four, however many requests it has waiting."""
    engine = ManualEngine(max_running=4)
    for caller in "aaaaaaaabbbb":
        await engine.ask(caller)
    shares = []
    for ends in "aaabb":
        await engine.end(next(name for name in engine.running if name[0] == ends))
        shares.append("".join(sorted(callers(list(engine.running)))))
    assert shares == ["aaab", "aabb", "aabb", "aabb", "aabb"]


async def test_callers_that_come_and_go_do_not_starve_another() -> None:
    """Callers that return as soon as they are served never overtake one that waits."""
    engine = ManualEngine(max_running=1)
    for caller in "abca":
        await engine.ask(caller)
    for _ in range(30):
        name = next(iter(engine.running))
        await engine.end(name)
        if len(engine.tasks) < 30:
            await engine.ask(name[0])
    assert callers(engine.order).startswith("abcabcabcabcabcabc")


class Watcher:
    """Checks after each event that the queue was fair."""

    def __init__(self, engine: ManualEngine, max_running: int) -> None:
        self.engine = engine
        self.max_running = max_running
        self.waiting: list[str] = []
        self.running: Counter[str] = Counter()
        self.passed: dict[str, Counter[str]] = {}
        self.seen = 0

    def check(self) -> None:
        """After an event: which request it submitted, and whether that was fair."""
        engine = self.engine
        live = engine.live
        for name in live:
            if name not in self.waiting and name not in engine.order[: self.seen]:
                self.waiting.append(name)
        self.waiting = [name for name in self.waiting if name in live]
        before = Counter(callers([n for n in engine.order[: self.seen] if n in live]))
        new = engine.order[self.seen :]
        assert len(new) <= 1
        for name in new:
            self._submitted(name, before)
        self.seen = len(engine.order)
        waiting = set(callers(self.waiting))
        now = Counter(callers(engine.running))
        self.passed = {c: p for c, p in self.passed.items() if c in waiting and not now[c]}
        assert len(engine.running) == min(self.max_running, len(live))

    def _submitted(self, name: str, running: Counter[str]) -> None:
        caller = name[0]
        assert name == next(n for n in self.waiting if n[0] == caller)
        self.waiting.remove(name)
        for other in set(callers(self.waiting)) - {caller}:
            assert running[caller] <= running[other]
            if not running[other]:
                passed = self.passed.setdefault(other, Counter())
                passed[caller] += 1
                assert passed[caller] == 1, "overtook a caller twice that has nothing running"


HAPPENINGS = ["ask"] * 4 + ["end"] * 4 + ["leave", "fail", "break"]
EVENTS = st.lists(
    st.tuples(st.sampled_from(HAPPENINGS), st.integers(0, 29)), min_size=20, max_size=100
)


async def happen(engine: ManualEngine, what: str, which: int) -> None:
    """Let one event happen, if there is a request that it can happen to."""
    if what == "ask":
        await engine.ask("abcd"[which % 4])
        return
    if what == "break" and which < 10:
        engine.queue.fail_all(EngineUnavailableError)
        await engine.settle()
    names = list(engine.running) if what == "end" else engine.live
    if not names or what == "break":
        return
    name = names[which % len(names)]
    if what == "end":
        await engine.end(name)
    elif what == "leave":
        await engine.leave(name)
    else:
        await engine.fail(name, DeadlineExceededError())


@pytest.mark.no_cover
@given(max_running=st.integers(1, 3), events=EVENTS)
def test_in_any_order_of_events_no_caller_is_starved_and_nothing_is_left(
    max_running: int, events: list[tuple[str, int]]
) -> None:
    """The choice is fair, no slot is free while a request waits, and nothing is left.

    The next request is never of a caller with more running requests than another that waits. No
    caller overtakes one twice that has nothing running. One caller's requests stay in order. Each
    request ends once.
    """

    async def run() -> None:
        engine = ManualEngine(max_running=max_running, max_waiting=1000)
        watcher = Watcher(engine, max_running)
        for event in events:
            await happen(engine, *event)
            watcher.check()
        while engine.running:
            await engine.end(next(iter(engine.running)))
            watcher.check()
        assert not engine.live
        for task in engine.tasks.values():
            if not task.cancelled() and not task.exception():
                assert [e.finish_reason for e in task.result()] == ["stop"]
        assert engine.is_empty()

    asyncio.run(run())
