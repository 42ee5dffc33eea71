"""Requests in hand: the engine has the next ones before their slots are free."""

import asyncio
import queue
from collections.abc import Mapping, Sequence
from typing import cast

import pytest

from app.llm.engine.base import (
    Backend,
    Cancel,
    Command,
    EngineInfo,
    EngineStats,
    GenerationRequest,
    Message,
    SamplingParams,
    Step,
    Submit,
    TokenEvent,
)
from app.llm.engine.echo import EchoBackend
from app.llm.engine.worker import Channel, Worker
from app.utils.errors import OverloadedError
from tests.support.queue import ManualEngine

SLOTS = 8


async def full(waiting: int, **limits: float) -> tuple[ManualEngine, list[str]]:
    """An engine of eight slots, all of them taken, and so many requests more."""
    engine = ManualEngine(max_running=SLOTS, max_waiting=32, **limits)
    return engine, [await engine.ask("a") for _ in range(SLOTS + waiting)]


def counts(engine: ManualEngine) -> tuple[int, int]:
    """Running and waiting requests, as the metrics and /status tell them."""
    now = engine.queue.snapshot()
    value = engine.metrics.registry.get_sample_value
    assert (value("llm_requests_running"), value("llm_requests_waiting")) == (
        now.running,
        now.waiting,
    )
    return now.running, now.waiting


async def test_one_request_for_eight_slots_is_handed_over_ahead() -> None:
    """It counts as waiting, and is running as soon as a slot is free; the next one follows it."""
    engine, names = await full(3)
    assert engine.order == names[: SLOTS + 1]
    assert counts(engine) == (SLOTS, 3)
    await engine.end(names[4])
    assert engine.order == names[: SLOTS + 2]
    assert counts(engine) == (SLOTS, 2)


@pytest.mark.parametrize("slots", [1, 7])
async def test_few_slots_have_no_request_in_hand(slots: int) -> None:
    """An empty slot of few costs little, and a request in hand can no longer be overtaken."""
    engine = ManualEngine(max_running=slots, max_waiting=8)
    names = [await engine.ask("a") for _ in range(slots + 2)]
    assert engine.order == names[:slots]


async def test_the_time_in_hand_is_time_in_the_queue() -> None:
    """The metrics count a request as begun when it has a slot, and not before."""
    engine, names = await full(1)
    value = engine.metrics.registry.get_sample_value
    assert value("llm_request_queue_seconds_count") == SLOTS
    assert value("llm_prompt_tokens_total") == SLOTS
    await engine.end(names[0])
    assert value("llm_request_queue_seconds_count") == SLOTS + 1
    assert value("llm_prompt_tokens_total") == SLOTS + 1


async def test_a_request_in_hand_can_wait_too_long() -> None:
    """It is refused, and taken back from the engine; those that run go on."""
    engine, names = await full(1, queue_timeout_seconds=0.05)
    with pytest.raises(OverloadedError):
        await engine.tasks[names[-1]]
    assert list(engine.running) == names[:SLOTS]
    assert counts(engine) == (SLOTS, 0)


async def test_what_is_being_answered_waits_no_longer() -> None:
    """After a restart the engine may have begun what counts as in hand here."""
    engine, names = await full(1, queue_timeout_seconds=0.05)
    engine.running[names[-1]].deliver(TokenEvent(names[-1], [2]))
    await asyncio.sleep(0.1)
    assert not engine.tasks[names[-1]].done()
    await engine.end(names[-1])
    assert [e.token_ids for e in await engine.tasks[names[-1]]] == [[2], [2]]


async def test_a_request_in_hand_that_leaves_makes_room_for_the_next() -> None:
    """The engine is told, and no slot is freed by it."""
    engine, names = await full(2)
    await engine.leave(names[SLOTS])
    assert list(engine.running) == [*names[:SLOTS], names[SLOTS + 1]]
    assert counts(engine) == (SLOTS, 1)


async def test_a_slot_is_free_before_its_reader_has_read_the_end() -> None:
    """A slow reader keeps its place, but no slot: the engine is done with it."""
    engine, names = await full(1)
    engine.running.pop(names[0]).deliver(TokenEvent(names[0], [2], finish_reason="stop"))
    assert counts(engine) == (SLOTS, 0)
    assert not engine.tasks[names[0]].done()
    await engine.settle()
    assert engine.tasks[names[0]].done()


async def test_nothing_is_left_of_requests_in_hand() -> None:
    """However they end."""
    engine, names = await full(4)
    await engine.leave(names[SLOTS + 1])
    await engine.end(names[3])
    await engine.leave(names[0])
    for name in [*engine.running]:
        await engine.leave(name)
    await engine.settle()
    for name in [*engine.running]:
        await engine.end(name)
    assert engine.is_empty()


class _Recorder:
    """A backend that notes each step's batch; the end of all work ends the test.

    Attributes:
        batches: The requests of each step.
    """

    def __init__(self) -> None:
        self._backend = EchoBackend()
        self._ids: list[str] = []
        self.batches: list[list[str]] = []

    @property
    def info(self) -> EngineInfo:
        return self._backend.info

    def add(self, request: GenerationRequest) -> None:
        self._ids.append(request.id)
        self._backend.add(request)

    def cancel(self, request_id: str) -> None:
        self._ids.remove(request_id)
        self._backend.cancel(request_id)

    def step(self) -> list[TokenEvent]:
        self.batches.append([*self._ids])
        events = self._backend.step()
        for event in events:
            if event.finish_reason:
                self._ids.remove(event.request_id)
        return events

    def has_work(self) -> bool:
        return self._backend.has_work()

    def stats(self) -> EngineStats:
        return self._backend.stats()


class _NothingMore(Exception):  # noqa: N818 - not an error
    pass


class _Script(Channel):
    """A channel that has brought some commands, and will bring no more.

    Attributes:
        events: What the worker has told, in order.
    """

    def __init__(self, commands: Sequence[Command]) -> None:
        self.events: list[TokenEvent] = []
        self.commands = cast("queue.SimpleQueue[Command]", self)
        self._left = [*commands]

    def get(self, *, block: bool) -> Command:
        if self._left:
            return self._left.pop(0)
        if block:
            raise _NothingMore
        raise queue.Empty

    def send(self, message: Message) -> None:
        assert isinstance(message, Step)
        self.events += message.events


def submit(name: str, tokens: int) -> Submit:
    """A request for so many tokens."""
    return Submit(GenerationRequest(name, [1] * 20, tokens, SamplingParams()))


def work(*commands: Command) -> tuple[list[list[str]], Mapping[str, str]]:
    """Let a worker of two slots do all of it: each step's batch, and how each request ended."""
    recorder, script = _Recorder(), _Script(commands)
    with pytest.raises(_NothingMore):
        Worker(script, cast("Backend", recorder), max_running=2).run()
    ends = {e.request_id: e.finish_reason for e in script.events if e.finish_reason}
    return recorder.batches, ends


def test_a_slot_that_a_step_frees_is_taken_in_the_next_step() -> None:
    """No step runs with an empty slot while a request is in hand; they begin in their order."""
    batches, ends = work(submit("a", 3), submit("b", 1), submit("c", 1), submit("d", 1))
    assert batches == [["a", "b"], ["a", "c"], ["a", "d"]]
    assert set(ends) == set("abcd")


def test_what_is_cancelled_in_hand_is_never_begun() -> None:
    """It ends as cancelled, and the one behind it moves up; one that runs frees its slot."""
    commands = [submit("a", 2), submit("b", 2), submit("c", 1), submit("d", 1)]
    batches, ends = work(*commands, Cancel("c"), Cancel("a"), Cancel("unknown"))
    assert batches == [["b", "d"], ["b"]]
    assert ends["a"] == ends["c"] == "cancelled"
    assert "unknown" not in ends


def test_a_request_in_hand_that_cannot_be_begun_takes_no_slot() -> None:
    """It fails alone, and the next one has the slot in the same step."""
    bad = Submit(GenerationRequest("bad", [10_000], 1, SamplingParams()))
    batches, ends = work(submit("a", 2), submit("b", 1), bad, submit("c", 1))
    assert batches == [["a", "b"], ["a", "c"]]
    assert ends["bad"] == "error"
