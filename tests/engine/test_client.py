"""Admission, cancellation, deadlines and measurements, with a real engine process."""

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from app.utils.errors import InternalError, OverloadedError
from tests.support.engine import EchoEngine, collect, echo_engine, idle, request

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[EchoEngine]:
    """An engine for the tests of this file: two requests run, six may wait."""
    async with echo_engine(max_running=2, max_waiting=6, echo_step_seconds=0.01) as engine:
        yield engine


async def test_an_answer_comes_whole_and_ends_once(engine: EchoEngine) -> None:
    """Every token of the answer arrives, in order, with one terminal event at the end."""
    events = await collect(engine.client, "Grüße 😀")
    assert engine.client.tokenizer is not None
    ids = [token for event in events for token in event.token_ids]
    assert engine.client.tokenizer.decoder.decode(ids) == "Grüße 😀"
    assert [e.finish_reason for e in events if e.finish_reason] == ["stop"]


async def test_places_are_bounded_and_more_requests_are_refused_at_once(
    engine: EchoEngine,
) -> None:
    """With all places taken the next request is refused; the others complete."""
    places = [engine.client.admit() for _ in range(8)]
    with pytest.raises(OverloadedError) as refusal:
        engine.client.admit()
    assert 1 <= int(refusal.value.headers["Retry-After"]) <= 60
    answers = await asyncio.gather(*(collect(engine.client, "hello", place) for place in places))
    assert [events[-1].finish_reason for events in answers] == ["stop"] * 8
    engine.client.admit().release()


async def test_requests_of_one_caller_are_first_come_first_served(engine: EchoEngine) -> None:
    """Waiting requests of one caller start in the order in which they came."""
    order: list[int] = []

    async def one(number: int) -> None:
        await collect(engine.client)
        order.append(number)

    await asyncio.gather(*(one(i) for i in range(8)))
    assert order == list(range(8))


async def test_a_release_frees_the_slot_in_both_processes(engine: EchoEngine) -> None:
    """Releasing the place of a long answer leaves nothing running."""
    cancelled = engine.value("llm_requests_cancelled_total")
    place = engine.client.admit()
    place.start(request(engine.client, "x" * 5000, 4000))
    await place.events()
    assert engine.value("llm_requests_running") == 1
    place.release()
    await idle(engine)
    assert engine.value("llm_requests_running") == 0
    assert engine.value("llm_requests_cancelled_total") == cancelled + 1


async def test_a_cancelled_request_that_waits_frees_its_place(engine: EchoEngine) -> None:
    """It no longer counts as waiting, and the next request is served."""
    first = [asyncio.create_task(collect(engine.client, "x" * 100)) for _ in range(2)]
    await asyncio.sleep(0.05)
    waiting = asyncio.create_task(collect(engine.client))
    await asyncio.sleep(0.05)
    assert engine.client.queue.snapshot().waiting == 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert engine.client.queue.snapshot().waiting == 0
    assert (await collect(engine.client))[-1].finish_reason == "stop"
    await asyncio.gather(*first)


async def test_a_fault_of_one_request_does_not_touch_the_others(engine: EchoEngine) -> None:
    """The faulty request gets an error; those in its batch get their whole answers."""
    good, bad = await asyncio.gather(
        collect(engine.client, "a good answer"),
        collect(engine.client, "[echo:fault]"),
        return_exceptions=True,
    )
    assert isinstance(bad, InternalError)
    assert isinstance(good, list)
    assert good[-1].finish_reason == "stop"
    assert engine.client.restarts == 0


_COUNTS = {
    "tokens_generated_total": {"model": "echo"},
    "llm_prompt_tokens_total": {},
    "llm_time_to_first_token_seconds_count": {},
    "llm_inter_token_latency_seconds_count": {},
    "llm_request_queue_seconds_count": {},
    "llm_request_duration_seconds_count": {"finish_reason": "stop"},
}


async def test_timings_are_measured(engine: EchoEngine) -> None:
    """One answer is observed once in every timing, and the gauges return to zero."""
    before = [engine.value(name, **labels) for name, labels in _COUNTS.items()]
    events = await collect(engine.client, "hello")
    after = [engine.value(name, **labels) for name, labels in _COUNTS.items()]
    count = sum(len(e.token_ids) for e in events)
    added = [new - old for new, old in zip(after, before, strict=True)]
    assert added == [count, 5, 1, len(events) - 1, 1, 1]
    assert engine.value("llm_requests_running") == 0
    assert engine.value("llm_requests_waiting") == 0
