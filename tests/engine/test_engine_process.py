"""Deadlines, restarts and the end, each with an engine process of its own."""

import asyncio
import os
import signal
import threading
from pathlib import Path

import pytest

from app.core.config import ModelSettings
from app.llm.client.client import EngineState
from app.utils.errors import (
    DeadlineExceededError,
    DrainingError,
    EngineFailedError,
    EngineUnavailableError,
    ModelLoadingError,
)
from tests.support.engine import EchoEngine, collect, echo_engine, idle, pid


async def test_nothing_is_admitted_while_loading() -> None:
    """Before the model is loaded, a request is refused with a Retry-After."""
    engine = EchoEngine()
    with pytest.raises(ModelLoadingError) as refusal:
        engine.client.admit()
    assert int(refusal.value.headers["Retry-After"]) >= 1
    assert engine.value("llm_requests_rejected_total", reason="model_loading") == 1


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


async def test_a_dead_engine_process_is_replaced() -> None:
    """Running requests get an error, new ones are refused until the engine is back, then served."""
    async with echo_engine(echo_step_seconds=0.01) as engine:
        client = engine.client
        for restarts, how in enumerate(("kill", "[echo:crash]", "[echo:raise]"), 1):
            before = await pid()
            running = asyncio.create_task(collect(client, "x" * 1000 if how == "kill" else how))
            if how == "kill":
                await asyncio.sleep(0.1)
                os.kill(before, signal.SIGKILL)
            with pytest.raises(EngineFailedError):
                async with asyncio.timeout(5):
                    await running
            await engine.until(EngineState.RESTARTING)
            with pytest.raises(EngineUnavailableError):
                client.admit()
            await engine.until(EngineState.READY)
            assert await pid(other_than=before)
            assert (await collect(client))[-1].finish_reason == "stop"
            assert engine.value("llm_engine_restarts_total") == restarts
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
    """A running request completes, a new one is refused, and the stop leaves no process."""
    async with echo_engine(echo_step_seconds=0.01) as engine:
        engine_pid = await pid()
        running = asyncio.create_task(collect(engine.client, "x" * 20))
        await asyncio.sleep(0.05)
        engine.client.drain()
        with pytest.raises(DrainingError):
            engine.client.admit()
        assert (await running)[-1].finish_reason == "stop"
    with pytest.raises(ProcessLookupError):
        os.kill(engine_pid, 0)


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
