"""Places: how many requests the engine gets, what a place tells its reader, and Retry-After."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from app.llm.prefix_index import BLOCK_SIZE
from app.llm.protocol import GenerationRequest, RegexGrammar, SamplingParams, TokenEvent
from app.utils.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineUnavailableError,
    InternalError,
    InvalidGrammarError,
    OverloadedError,
    ServiceError,
)
from tests.support.queue import ManualEngine, read

SLOTS = 8


def request(name: str = "r", prompt: Sequence[int] = (1, 2, 3)) -> GenerationRequest:
    """A request with a prompt of three tokens."""
    return GenerationRequest(name, list(prompt), 8, SamplingParams())


async def full(more: int, **limits: float) -> tuple[ManualEngine, list[str]]:
    """An engine of eight slots, all of them taken, and more requests of the same caller."""
    engine = ManualEngine(max_running=SLOTS, max_waiting=32, **limits)
    return engine, [await engine.ask("a") for _ in range(SLOTS + more)]


def counts(engine: ManualEngine) -> tuple[int, int]:
    """Running and waiting requests, as /status and the metrics tell them."""
    now = engine.queue.snapshot()
    assert int(engine.value("llm_requests_running")) == now.running
    assert int(engine.value("llm_requests_waiting")) == now.waiting
    return now.running, now.waiting


# --- what the engine gets ----------------------------------------------------------------------


async def test_one_request_for_eight_slots_is_submitted_ahead() -> None:
    """It counts as waiting until the engine has given it a slot; the next one follows it."""
    engine, names = await full(3)
    assert engine.order == names[: SLOTS + 1]
    assert counts(engine) == (SLOTS, 3)
    await engine.end(names[4])
    assert engine.order == names[: SLOTS + 2]
    assert counts(engine) == (SLOTS, 2)


@pytest.mark.parametrize("slots", [1, 7])
async def test_with_few_slots_none_is_submitted_ahead(slots: int) -> None:
    """An empty slot of few costs little, and a submitted request can no longer be overtaken."""
    engine = ManualEngine(max_running=slots, max_waiting=8)
    names = [await engine.ask("a") for _ in range(slots + 2)]
    assert engine.order == names[:slots]


async def test_a_request_has_begun_when_the_engine_says_so() -> None:
    """Queue time and prompt tokens are counted with the slot, not with the submission."""
    engine, names = await full(1)
    assert engine.value("llm_request_queue_seconds_count") == SLOTS
    assert engine.value("llm_prompt_tokens_total") == SLOTS
    await engine.end(names[0])
    assert engine.value("llm_request_queue_seconds_count") == SLOTS + 1
    assert engine.value("llm_prompt_tokens_total") == SLOTS + 1


async def test_a_request_submitted_ahead_can_wait_too_long() -> None:
    """It is refused, and taken back from the engine; those that run go on."""
    engine, names = await full(1, queue_timeout_seconds=0.05)
    with pytest.raises(OverloadedError):
        await engine.tasks[names[-1]]
    assert engine.running == names[:SLOTS]
    assert engine.ahead == []
    assert counts(engine) == (SLOTS, 0)
    assert engine.value("llm_requests_rejected_total", reason="queue_timeout") == 1


async def test_a_request_that_has_begun_never_waits_too_long_again() -> None:
    """One that lost its slot with the engine process waits again, but by other limits."""
    engine, names = await full(0, queue_timeout_seconds=0.05)
    engine.places[names[0]].slot_lost()
    assert engine.queue.snapshot().waiting == 1
    await asyncio.sleep(0.1)
    assert engine.live == names
    engine.places[names[0]].slot_taken()
    assert engine.queue.snapshot().waiting == 0
    assert engine.value("llm_request_queue_seconds_count") == SLOTS


async def test_a_request_submitted_ahead_that_leaves_makes_room_for_the_next() -> None:
    """The engine is told, and no slot is freed by it."""
    engine, names = await full(2)
    await engine.leave(names[SLOTS])
    assert [*engine.running, *engine.ahead] == [*names[:SLOTS], names[SLOTS + 1]]
    assert counts(engine) == (SLOTS, 1)


async def test_the_next_request_is_submitted_before_the_last_event_is_read() -> None:
    """A slow reader keeps its place, but no slot: the engine is done with it."""
    engine, names = await full(2)
    engine.deliver(names[0])
    assert engine.order == names
    assert not engine.tasks[names[0]].done()
    await engine.settle()
    assert engine.tasks[names[0]].done()


async def test_nothing_is_left_of_requests_however_they_end() -> None:
    """Ended, left or failed, in the engine or before it."""
    engine, names = await full(5)
    await engine.leave(names[SLOTS + 2])
    await engine.fail(names[SLOTS + 3], DeadlineExceededError())
    await engine.end(names[3])
    await engine.leave(names[0])
    for name in engine.live:
        await engine.leave(name)
    assert engine.is_empty()
    assert counts(engine) == (0, 0)


async def test_when_all_fail_none_moves_up_to_the_engine() -> None:
    """Requests that wait are not submitted only to be stopped."""
    engine, names = await full(10)
    submitted = len(engine.order)
    engine.queue.fail_all(EngineUnavailableError)
    await engine.settle()
    assert len(engine.order) == submitted
    for name in names:
        assert isinstance(engine.tasks[name].exception(), EngineUnavailableError)
    assert engine.is_empty()


async def test_the_last_eighth_of_the_waiting_places_is_for_callers_without_a_place() -> None:
    """One caller gets no more than the rest; others still come in, until all is full."""
    engine = ManualEngine(max_running=1, max_waiting=16)
    for _ in range(15):
        assert not engine.queue.is_crowded
        await engine.ask("a")
    assert engine.queue.is_crowded
    with pytest.raises(OverloadedError):
        await engine.ask("a")
    await engine.ask("b")
    with pytest.raises(OverloadedError):
        await engine.ask("b")
    await engine.ask("c")
    for caller in "abcd":
        with pytest.raises(OverloadedError):
            await engine.ask(caller)


# --- what a place tells its reader -------------------------------------------------------------


async def test_a_caller_is_told_of_its_own_cached_tokens_alone() -> None:
    """What the engine has cached of others' prompts is not told; a caller's own answers are."""
    engine, blocks = ManualEngine(), 3
    prompt, answer = list(range(blocks * BLOCK_SIZE)), [7] * BLOCK_SIZE
    told: list[int] = []
    for caller, tokens in (
        ("a", prompt),
        ("b", prompt),
        ("b", prompt),
        ("b", [*prompt, *answer, 1]),
        ("a", [*prompt, *answer, 1]),
        ("c", prompt[:BLOCK_SIZE]),
        ("c", prompt),
    ):
        with engine.queue.admit(engine, caller) as place:
            place.start(request(f"{caller}{len(told)}", tokens))
            place.deliver(TokenEvent("r", answer, cached_tokens=len(tokens) - 1))
            await place.events()
            told.append(place.cached_tokens)
    most = len(prompt)
    assert told == [0, 0, most - 1, most + BLOCK_SIZE, most + BLOCK_SIZE, 0, BLOCK_SIZE]
    assert engine.value("llm_prefix_cached_tokens_total") > sum(told)


async def test_events_come_together_and_are_counted_when_they_are_taken() -> None:
    """Those that came while nobody looked are one list; then the reader waits for the next."""
    engine = ManualEngine()
    place = engine.queue.admit(engine, "a")
    place.start(request())
    assert (place.accepted, place.prompt_tokens) == (True, 3)
    place.deliver(TokenEvent("r", [1], cached_tokens=2))
    place.deliver(TokenEvent("r", [2, 3]))
    assert place.completion_tokens == 0
    assert [e.token_ids for e in await place.events()] == [[1], [2, 3]]
    assert place.completion_tokens == 3
    waiting = asyncio.create_task(place.events())
    await engine.settle()
    assert not waiting.done()
    place.deliver(TokenEvent("r", [4], finish_reason="stop"))
    assert [e.finish_reason for e in await waiting] == ["stop"]
    place.release()
    assert engine.queue.is_empty


@pytest.mark.parametrize("in_engine", [True, False])
async def test_a_failure_comes_after_the_events_before_it(*, in_engine: bool) -> None:
    """Whether the engine reports it or the place fails; it is not an event itself."""
    engine = ManualEngine()
    place = engine.queue.admit(engine, "a")
    place.start(request())
    place.deliver(TokenEvent("r", [1]))
    if in_engine:
        place.deliver(TokenEvent("r", finish_reason="error", error="KeyError"))
    else:
        place.fail(DrainingError())
    assert [e.token_ids for e in await place.events()] == [[1]]
    with pytest.raises(InternalError if in_engine else DrainingError):
        await place.events()
    place.release()
    failed = engine.value("llm_request_duration_seconds_count", finish_reason="error")
    assert failed == (1 if in_engine else 0)
    place.release()
    assert engine.queue.is_empty


async def test_a_grammar_that_the_engine_refuses_is_the_callers_fault() -> None:
    """The error is a 400 that names the field."""
    engine = ManualEngine()
    place = engine.queue.admit(engine, "a")
    place.start(replace(request(), grammar=RegexGrammar("a")))
    place.deliver(TokenEvent("r", finish_reason="error", error="GrammarError", refused=True))
    with pytest.raises(InvalidGrammarError) as found:
        await place.events()
    assert (found.value.status, found.value.param) == (400, "response_format")
    place.release()


class Listener:
    """Notes what it is told of a place."""

    id = "listened"

    def __init__(self) -> None:
        self.told: list[Any] = []

    def accepted(self) -> None:
        """The request is queued."""
        self.told.append("accepted")

    def failed(self, error: ServiceError) -> None:
        """It failed before that."""
        self.told.append(type(error))


async def test_a_place_that_fails_before_it_is_started_says_so_once() -> None:
    """Then it cannot be started; its first error stays."""
    engine = ManualEngine()
    listener = Listener()
    place = engine.queue.admit(engine, "a", listener)
    place.fail(DrainingError())
    place.fail(DeadlineExceededError())
    assert listener.told == [DrainingError]
    with pytest.raises(DrainingError):
        await read(place, request())
    assert not place.accepted
    assert engine.order == []
    assert engine.queue.is_empty


async def test_a_place_that_was_started_fails_by_its_events_alone() -> None:
    """Who prepared the prompt has nothing left to cancel."""
    engine = ManualEngine(request_timeout_seconds=0.05)
    listener = Listener()
    place = engine.queue.admit(engine, "a", listener)
    with pytest.raises(DeadlineExceededError):
        await read(place, request())
    assert listener.told == ["accepted"]


async def test_finishing_stops_the_engine_and_counts_as_served() -> None:
    """The answer is complete; nothing was cancelled, whether or not the engine had ended too."""
    engine = ManualEngine()
    for last in (False, True):
        name = await engine.ask("a")
        place = engine.places[name]
        engine.deliver(name, last=last)
        place.finish()
        assert name not in engine.running
        await engine.leave(name)
    assert engine.value("llm_request_duration_seconds_count", finish_reason="stop") == 2
    assert engine.value("llm_requests_cancelled_total") == 0
    assert engine.is_empty()


async def test_a_release_stops_what_runs_and_may_come_twice() -> None:
    """It counts as cancelled, once; a place that was never started does not."""
    engine = ManualEngine()
    engine.queue.admit(engine, "a").release()
    name = await engine.ask("a")
    for _ in range(2):
        engine.places[name].release()
    assert engine.running == []
    assert engine.value("llm_requests_cancelled_total") == 1
    assert engine.queue.is_empty
    await engine.leave(name)


# --- Retry-After -------------------------------------------------------------------------------


async def refused(engine: ManualEngine) -> int:
    """What one more caller is told, with no place left."""
    while not engine.queue.is_crowded:
        engine.queue.admit(engine, "the first")
    for number in range(engine.settings.max_waiting // 8):
        engine.queue.admit(engine, f"caller {number}")
    with pytest.raises(OverloadedError) as refusal:
        engine.queue.admit(engine, "one more")
    assert refusal.value.headers["Retry-After"] == str(refusal.value.retry_after)
    return refusal.value.retry_after


@pytest.mark.parametrize(
    ("seconds", "waiting", "told"),
    [
        pytest.param([], 4, 10, id="five seconds are supposed before the first answer"),
        pytest.param([1, 3], 4, 4, id="mean times waiting requests divided by slots"),
        pytest.param([2.5], 0, 2, id="without waiting places, until a slot is free"),
        pytest.param([0.01], 8, 1, id="at least a second"),
        pytest.param([600], 8, 60, id="at most a minute"),
        pytest.param([900] * 100 + [1] * 256, 8, 4, id="only the last answers count"),
    ],
)
async def test_retry_after_is_the_time_for_what_waits(
    seconds: list[float], waiting: int, told: int
) -> None:
    """The mean time of a served request in its slot, times those that wait, over the slots."""
    engine = ManualEngine(max_running=2, max_waiting=waiting)
    for one in seconds:
        engine.queue.served(one)
    assert await refused(engine) == told


async def test_only_whole_answers_are_measured() -> None:
    """Requests whose callers leave, or that fail, do not make the service look fast."""
    engine = ManualEngine(max_running=1, max_waiting=4)
    for _ in range(10):
        await engine.leave(await engine.ask("a"))
        await engine.fail(await engine.ask("a"), DeadlineExceededError())
    await engine.end(await engine.ask("a"))
    # The one that was served took no time.
    assert await refused(engine) == 1
    engine = ManualEngine(max_running=1, max_waiting=4)
    for _ in range(10):
        await engine.leave(await engine.ask("a"))
        await engine.fail(await engine.ask("a"), DeadlineExceededError())
    assert await refused(engine) == 20


async def test_who_waited_too_long_is_told_when_to_come_back() -> None:
    """By the same rule."""
    engine, names = await full(16, queue_timeout_seconds=0.05)
    engine.queue.served(4.0)
    with pytest.raises(OverloadedError) as refusal:
        await engine.tasks[names[-1]]
    assert 1 <= refusal.value.retry_after <= 8
