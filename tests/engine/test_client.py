"""Admission, deadlines, cancellation and supervision, with a real engine process."""

import asyncio
import os
import signal
import threading
from pathlib import Path

import pytest

from app.core.config import ModelSettings
from app.llm.client.client import EngineClient, EngineState
from app.llm.client.place import Place
from app.llm.protocol import GenerationRequest, SamplingParams, TokenEvent
from app.utils.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineFailedError,
    EngineUnavailableError,
    InternalError,
    ModelLoadingError,
    OverloadedError,
)
from tests.support.engine import EchoEngine, echo_engine, idle, pid
from tests.support.queue import read

_ids = iter(range(1_000_000))


def request(client: EngineClient, text: str = "hello", max_tokens: int = 100) -> GenerationRequest:
    """A request whose answer is ``text``."""
    assert client.tokenizer is not None
    return GenerationRequest(
        id=f"r{next(_ids)}",
        prompt_token_ids=client.tokenizer.encode_text(text),
        max_tokens=max_tokens,
        sampling=SamplingParams(),
    )


async def collect(
    client: EngineClient, text: str = "hello", place: Place | None = None
) -> list[TokenEvent]:
    """All events of one request."""
    return await read(place or client.admit(), request(client, text))


async def test_an_answer_comes_whole_and_ends_once() -> None:
    """Every token of the answer arrives, in order, with one terminal event at the end."""
    async with echo_engine() as engine:
        events = await collect(engine.client, "Grüße 😀")
        assert engine.client.tokenizer is not None
        ids = [token for event in events for token in event.token_ids]
        assert engine.client.tokenizer.decoder.decode(ids) == "Grüße 😀"
        assert [e.finish_reason for e in events if e.finish_reason] == ["stop"]


async def test_nothing_is_admitted_while_loading() -> None:
    """Before the model is loaded, a request is refused with a Retry-After."""
    engine = EchoEngine()
    with pytest.raises(ModelLoadingError) as refusal:
        engine.client.admit()
    assert int(refusal.value.headers["Retry-After"]) >= 1
    assert engine.value("llm_requests_rejected_total", reason="model_loading") == 1


async def test_places_are_bounded_and_more_requests_are_refused_at_once() -> None:
    """With all places taken the next request is refused; the others complete."""
    async with echo_engine(max_running=2, max_waiting=1, echo_step_seconds=0.01) as engine:
        places = [engine.client.admit() for _ in range(3)]
        with pytest.raises(OverloadedError) as refusal:
            engine.client.admit()
        assert 1 <= int(refusal.value.headers["Retry-After"]) <= 60
        answers = await asyncio.gather(
            *(collect(engine.client, "hello", place) for place in places)
        )
        assert [events[-1].finish_reason for events in answers] == ["stop"] * 3
        engine.client.admit().release()


async def test_requests_of_one_caller_are_first_come_first_served() -> None:
    """Waiting requests of one caller start in the order in which they came."""
    async with echo_engine(max_running=1, echo_step_seconds=0.001) as engine:
        order: list[int] = []

        async def one(number: int) -> None:
            await collect(engine.client)
            order.append(number)

        await asyncio.gather(*(one(i) for i in range(8)))
        assert order == list(range(8))


async def test_a_release_frees_the_slot_in_both_processes() -> None:
    """Releasing the place of a long answer leaves nothing running."""
    async with echo_engine(echo_step_seconds=0.01) as engine:
        place = engine.client.admit()
        place.start(request(engine.client, "x" * 5000, 4000))
        await place.events()
        assert engine.value("llm_requests_running") == 1
        place.release()
        await idle(engine)
        assert engine.value("llm_requests_running") == 0
        assert engine.value("llm_requests_cancelled_total") == 1


async def test_a_cancelled_request_that_waits_frees_its_place() -> None:
    """It no longer counts as waiting, and the next request is served."""
    async with echo_engine(max_running=1, max_waiting=2, echo_step_seconds=0.01) as engine:
        first = asyncio.create_task(collect(engine.client, "x" * 100))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(collect(engine.client))
        await asyncio.sleep(0.05)
        assert engine.client.queue.snapshot().waiting == 1
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert engine.client.queue.snapshot().waiting == 0
        assert (await collect(engine.client))[-1].finish_reason == "stop"
        await first


async def test_the_deadline_counts_waiting_and_generating() -> None:
    """A request that takes too long fails, running or waiting, and frees its place."""
    async with echo_engine(
        max_running=1, request_timeout_seconds=0.3, echo_step_seconds=0.02
    ) as engine:
        results = await asyncio.gather(
            *(collect(engine.client, "x" * 5000) for _ in range(2)), return_exceptions=True
        )
        assert [type(r) for r in results] == [DeadlineExceededError, DeadlineExceededError]
        await idle(engine)


async def test_a_fault_of_one_request_does_not_touch_the_others() -> None:
    """The faulty request gets an error; those in its batch get their whole answers."""
    async with echo_engine(echo_step_seconds=0.005) as engine:
        good, bad = await asyncio.gather(
            collect(engine.client, "a good answer"),
            collect(engine.client, "[echo:fault]"),
            return_exceptions=True,
        )
        assert isinstance(bad, InternalError)
        assert isinstance(good, list)
        assert good[-1].finish_reason == "stop"
        assert engine.client.restarts == 0


@pytest.mark.parametrize("how", ["kill", "[echo:crash]", "[echo:raise]"])
async def test_a_dead_engine_process_is_replaced(how: str) -> None:
    """Running requests get an error, the engine comes back, and new requests succeed."""
    async with echo_engine(echo_step_seconds=0.01) as engine:
        client = engine.client
        before = await pid()
        text = "x" * 1000 if how == "kill" else how
        running = asyncio.create_task(collect(client, text))
        if how == "kill":
            await asyncio.sleep(0.1)
            os.kill(before, signal.SIGKILL)
        with pytest.raises(EngineFailedError):
            async with asyncio.timeout(5):
                await running
        await engine.until(EngineState.READY)
        assert await pid(other_than=before)
        assert (await collect(client))[-1].finish_reason == "stop"
        assert engine.value("llm_engine_restarts_total") == 1
        assert engine.fatal == []


@pytest.mark.parametrize("how", ["hang", "spin"])
async def test_a_step_that_never_returns_is_noticed(how: str) -> None:
    """A hanging step shows by the idle process, a busy one by engine.step_timeout_seconds."""
    timeouts = {"step_timeout_seconds": 60 if how == "hang" else 1, "stall_timeout_seconds": 1}
    async with echo_engine(echo_step_seconds=0.01, **timeouts) as engine:
        running = asyncio.create_task(collect(engine.client, f"[echo:{how}]"))
        with pytest.raises(EngineFailedError):
            async with asyncio.timeout(10):
                await running
        await engine.until(EngineState.READY)
        assert (await collect(engine.client))[-1].finish_reason == "stop"
        assert engine.client.restarts == 1


async def test_an_engine_that_hangs_is_noticed_when_its_caller_has_left() -> None:
    """A hung engine owes the end of the request, so the caller's patience does not matter."""
    async with echo_engine(echo_step_seconds=0.01, stall_timeout_seconds=5) as engine:
        running = asyncio.create_task(collect(engine.client, "[echo:hang]"))
        async with asyncio.timeout(10):
            # The fourth step hangs.
            while engine.value("tokens_generated_total", model="echo") < 3:  # noqa: ASYNC110 - polls another process
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        running.cancel()
        await asyncio.wait({running})
        assert engine.client.is_idle
        assert engine.client.restarts == 0
        await engine.until(EngineState.RESTARTING)
        await engine.until(EngineState.READY)
        assert "not used or awaited a processor" in str(engine.client.last_end)


async def test_requests_without_a_token_are_tried_once_more() -> None:
    """Requests that wait or have got no token yet outlive the engine process."""
    async with echo_engine(max_running=1, echo_step_seconds=0.5) as engine:
        answers = [asyncio.create_task(collect(engine.client, text)) for text in ("a", "b")]
        await asyncio.sleep(0.05)
        os.kill(await pid(), signal.SIGKILL)
        assert [len(events) for events in await asyncio.gather(*answers)] == [2, 2]
        assert engine.client.restarts == 1
        assert engine.value("llm_requests_running") == engine.value("llm_requests_waiting") == 0


async def test_only_the_request_that_kills_the_engine_twice_is_given_up() -> None:
    """The other requests that it killed are tried without it, and get their whole answers."""
    async with echo_engine(echo_step_seconds=0.2) as engine:
        # The others are submitted during the first step of the first one.
        texts = ["the first", "[echo:poison]", "b", "c"]
        answers = await asyncio.gather(
            *(collect(engine.client, text) for text in texts), return_exceptions=True
        )
        assert [type(answer) for answer in answers[:2]] == [EngineFailedError] * 2
        assert [len(answer) for answer in answers[2:] if isinstance(answer, list)] == [2, 2]
        assert engine.client.restarts == 2


async def test_waiting_for_a_new_engine_process_is_limited() -> None:
    """A request to be tried again fails after engine.queue_timeout_seconds without an engine."""
    async with echo_engine(queue_timeout_seconds=0.3, echo_step_seconds=0.5) as engine:
        running = asyncio.create_task(collect(engine.client))
        await asyncio.sleep(0.05)
        before = await pid()
        os.kill(before, signal.SIGKILL)
        await engine.until(EngineState.RESTARTING)
        # The request that ran waits for the next process.
        assert engine.value("llm_requests_running") == 0
        assert engine.value("llm_requests_waiting") == 1
        # The next process does not become ready in time.
        os.kill(await pid(other_than=before), signal.SIGSTOP)
        with pytest.raises(EngineFailedError):
            await running
        await idle(engine)


async def test_requests_are_refused_while_the_engine_restarts() -> None:
    """Until the next process is ready the error is engine_unavailable."""
    async with echo_engine() as engine:
        os.kill(await pid(), signal.SIGKILL)
        await engine.until(EngineState.RESTARTING)
        with pytest.raises(EngineUnavailableError):
            engine.client.admit()
        await engine.until(EngineState.READY)


async def test_a_model_that_cannot_be_loaded_is_fatal_with_one_line(tmp_path: Path) -> None:
    """The engine is not started again, and the line says what is wrong."""
    engine = EchoEngine(model=ModelSettings(source="local", name=str(tmp_path / "missing")))
    await engine.client.start()
    message = await engine.ended()
    await engine.client.stop()
    assert "does not exist" in message
    assert "\n" not in message


async def test_there_is_time_to_send_the_last_errors_before_exit() -> None:
    """An error is sent after its request has released its place, and before the service exits."""
    async with echo_engine(max_restarts=0, echo_step_seconds=0.1) as engine:
        running = asyncio.create_task(collect(engine.client, "x" * 100))
        async with asyncio.timeout(10):
            # With a token it is not tried again.
            while not engine.value("tokens_generated_total", model="echo"):  # noqa: ASYNC110 - polls another process
                await asyncio.sleep(0.01)
        os.kill(await pid(), signal.SIGKILL)
        with pytest.raises(EngineFailedError):
            await running
        assert engine.client.is_idle
        await engine.until(EngineState.FAILED)
        await asyncio.sleep(0.1)
        assert engine.fatal == []
        assert "died 1 times" in await engine.ended()


async def test_requests_are_taken_when_the_service_is_prepared_too() -> None:
    """The preparation runs once, on a thread, and is not repeated when the engine restarts."""
    engine = EchoEngine(stall_timeout_seconds=1)
    proceed = threading.Event()
    threads: list[int] = []

    def prepare() -> None:
        threads.append(threading.get_ident())
        assert proceed.wait(30)

    await engine.client.start(prepare)
    # The engine process is ready in less than half a second, and then idle for longer than a
    # process with work may be.
    await asyncio.sleep(3)
    assert engine.client.state is EngineState.LOADING
    with pytest.raises(ModelLoadingError):
        engine.client.admit()
    proceed.set()
    await engine.until(EngineState.READY)
    assert (await collect(engine.client))[-1].finish_reason == "stop"
    assert engine.client.restarts == 0
    os.kill(await pid(), signal.SIGKILL)
    await engine.until(EngineState.RESTARTING)
    await engine.until(EngineState.READY)
    await engine.client.stop()
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


async def test_the_slowest_echo_is_ready_as_soon_as_any() -> None:
    """Only its steps are slow; nothing is generated before it is ready."""
    async with echo_engine(echo_step_seconds=2.0) as engine:
        assert engine.client.restarts == 0


async def test_a_service_that_cannot_be_prepared_exits() -> None:
    """It is not tried again, since a restart of the engine would not repair it."""
    engine = EchoEngine()

    def prepare() -> None:
        raise ImportError

    await engine.client.start(prepare)
    assert await engine.ended() == "the service cannot be made ready; the log above says why"
    await engine.client.stop()
    assert engine.client.restarts == 0


async def test_draining_finishes_requests_and_takes_no_new_ones() -> None:
    """A running request completes; a new one is refused."""
    async with echo_engine(echo_step_seconds=0.01) as engine:
        running = asyncio.create_task(collect(engine.client, "x" * 20))
        await asyncio.sleep(0.05)
        engine.client.drain()
        with pytest.raises(DrainingError):
            engine.client.admit()
        assert (await running)[-1].finish_reason == "stop"


async def test_aborting_ends_running_requests() -> None:
    """They fail as draining, and nothing is left."""
    async with echo_engine(echo_step_seconds=0.01) as engine:
        running = asyncio.create_task(collect(engine.client, "x" * 5000))
        await asyncio.sleep(0.05)
        engine.client.drain()
        engine.client.abort_running()
        with pytest.raises(DrainingError):
            await running
        await idle(engine)


async def test_stopping_leaves_no_process() -> None:
    """After stop, the engine process is gone."""
    async with echo_engine():
        engine_pid = await pid()
    with pytest.raises(ProcessLookupError):
        os.kill(engine_pid, 0)


async def test_timings_are_measured() -> None:
    """One answer is observed once in every timing, and the gauges return to zero."""
    async with echo_engine(echo_step_seconds=0.002) as engine:
        events = await collect(engine.client, "hello")
        count = sum(len(e.token_ids) for e in events)
        assert engine.value("tokens_generated_total", model="echo") == count
        assert engine.value("llm_prompt_tokens_total") == 5
        assert engine.value("llm_time_to_first_token_seconds_count") == 1
        assert engine.value("llm_inter_token_latency_seconds_count") == len(events) - 1
        assert engine.value("llm_request_queue_seconds_count") == 1
        assert engine.value("llm_request_duration_seconds_count", finish_reason="stop") == 1
        assert engine.value("llm_requests_running") == 0
        assert engine.value("llm_requests_waiting") == 0
