"""Which request is next and how long it may wait, with a real engine process."""

import asyncio

import pytest

from app.llm.report import GenerationReport
from app.services.flights import Flight
from app.utils.errors import DeadlineExceededError, OverloadedError, ServiceError
from tests.support.engine import EchoEngine, collect, echo_engine, idle, request


async def finished(engine: EchoEngine, callers: str) -> str:
    """Send one request for each letter, in this order; returns the order of the answers."""
    order: list[str] = []

    async def one(caller: str) -> None:
        await collect(engine.client, place=engine.client.admit(caller))
        order.append(caller)

    await asyncio.gather(*(one(caller) for caller in callers))
    return "".join(order)


async def test_a_hundred_requests_of_one_caller_do_not_delay_another() -> None:
    """The other caller's request is the next one after the one that runs."""
    async with echo_engine(max_running=1) as engine:
        assert await finished(engine, "a" * 100 + "b") == "ab" + "a" * 99
        assert engine.client.is_idle


async def test_competing_callers_alternate() -> None:
    """So do three callers with unequal numbers of requests, while they have any."""
    async with echo_engine(max_running=1) as engine:
        assert await finished(engine, "aaaaabbbcc") == "abcabcabaa"


async def test_one_caller_cannot_take_the_last_eighth_of_the_waiting_places() -> None:
    """It is refused, another caller is admitted."""
    async with echo_engine(max_running=1, max_waiting=8) as engine:
        places = [engine.client.admit("a") for _ in range(8)]
        with pytest.raises(OverloadedError):
            engine.client.admit("a")
        places.append(engine.client.admit("b"))
        with pytest.raises(OverloadedError):
            engine.client.admit("c")
        for place in places:
            place.release()
        assert engine.value("llm_requests_rejected_total", reason="overloaded") == 2


async def test_a_request_that_waits_too_long_is_refused_and_one_that_runs_is_not() -> None:
    """The waiting one gets a Retry-After."""
    async with echo_engine(
        max_running=1, queue_timeout_seconds=0.3, echo_step_seconds=0.02
    ) as engine:
        running = asyncio.create_task(collect(engine.client, "x" * 90, engine.client.admit("a")))
        await asyncio.sleep(0.05)
        with pytest.raises(OverloadedError) as refusal:
            await collect(engine.client, place=engine.client.admit("b"))
        assert 1 <= refusal.value.retry_after <= 60
        assert not running.done()
        assert engine.client.queue.snapshot().waiting == 0
        # It runs for two seconds, longer than a request may wait.
        assert (await running)[-1].finish_reason == "stop"
        assert engine.value("llm_requests_rejected_total", reason="queue_timeout") == 1
        assert engine.client.is_idle


async def test_a_request_fails_while_its_prompt_is_prepared() -> None:
    """Both limits end it then, and the engine never gets it."""
    async with echo_engine(queue_timeout_seconds=0.1) as engine:
        for error in (OverloadedError, DeadlineExceededError):
            flight = Flight()

            async def prepare(flight: Flight, error: type[ServiceError]) -> GenerationReport:
                with engine.client.admit("a", flight) as place:
                    if error is DeadlineExceededError:
                        place.fail(DeadlineExceededError())
                    await asyncio.sleep(600)
                raise AssertionError

            flight.start(prepare(flight, error))
            with pytest.raises(error):
                await flight.until_accepted()
        assert engine.value("llm_prompt_tokens_total") == 0
        assert engine.client.is_idle


async def test_cancelled_requests_make_room_for_the_next() -> None:
    """A cancelled request frees its slot, or never takes one."""
    async with echo_engine(max_running=1, echo_step_seconds=0.01) as engine:
        client = engine.client
        place = client.admit("a")
        place.start(request(client, "x" * 5000, 4000))
        await place.events()
        waiting = [
            asyncio.create_task(collect(client, place=client.admit(caller))) for caller in "abc"
        ]
        await asyncio.sleep(0.05)
        waiting[1].cancel()
        place.release()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert [task.cancelled() for task in waiting] == [False, True, False]
        assert waiting[2].result()[-1].finish_reason == "stop"
        await idle(engine)
