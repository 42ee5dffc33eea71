"""Failures of the engine process, and requests while the model loads."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.fake_hub import running_hub
from tests.support.live import LONG, STEP, ask, background, generate, open_stream, rest_of
from tests.support.service import Service, running_service
from tests.support.sse import Streamed, piece_of, read_stream
from tests.support.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def mortal_service() -> Iterator[Service]:
    """A slow service whose engine is killed three times: each start waits longer than the last."""
    with running_service(ENGINE__ECHO_STEP_SECONDS=str(STEP)) as service:
        yield service


@pytest.fixture
def fresh_service() -> Iterator[Service]:
    """A slow service for one test that kills its engine more than once."""
    with running_service(ENGINE__ECHO_STEP_SECONDS=str(STEP)) as service:
        yield service


def check_restarted(service: Service, pid: int, restarts: float) -> None:
    """Assert that another engine process serves, in the same service."""
    service.wait_until_ready()
    assert service.engine_pid != pid
    assert service.process.poll() is None
    assert service.metric("llm_engine_restarts_total") == restarts
    assert service.metric("llm_requests_running") == 0
    response = ask(service, generate("after"))
    assert response.json()["generated_text"] == "after"
    assert service.get("/health").json()["status"] == "healthy"


def test_requests_are_rejected_while_the_engine_restarts(mortal_service: Service) -> None:
    """Until the new engine is ready, the service says that it is loading and answers 503."""
    pid, restarts = mortal_service.engine_pid, mortal_service.metric("llm_engine_restarts_total")
    os.kill(pid, signal.SIGKILL)
    mortal_service.wait_for(lambda: mortal_service.engine_pid != pid, "another engine process")
    # A stopped engine cannot become ready.
    os.kill(mortal_service.engine_pid, signal.SIGSTOP)
    health = mortal_service.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "loading")
    assert mortal_service.get("/readyz").status_code == 503
    assert mortal_service.get("/livez").status_code == 200
    refused = ask(mortal_service, generate("x"))
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_unavailable"
    assert int(refused.headers["retry-after"]) >= 1
    os.kill(mortal_service.engine_pid, signal.SIGCONT)
    check_restarted(mortal_service, pid, restarts + 1)


def test_one_requests_fault_does_not_hurt_its_neighbours(mortal_service: Service) -> None:
    """A request that fails in the engine gets 500, and the others of its batch go on."""
    pid = mortal_service.engine_pid
    with (
        open_stream(mortal_service, generate("s" * 30)) as found,
        background(ask, mortal_service, generate("w" * 30)) as whole,
    ):
        mortal_service.wait_for_metric("llm_requests_running", 2)
        failed = ask(mortal_service, generate("[echo:fault]"))
        assert failed.status_code == 500
        assert failed.json()["error"]["code"] == "internal_error"
        with mortal_service.client() as client:
            streamed = read_stream(client, "/v1/generate", generate("[echo:fault]"))
        assert streamed.done
        assert streamed.error is not None
        assert streamed.error["code"] == "internal_error"
        assert "".join(piece_of(event) or "" for event in rest_of(found)) == "s" * 29
        assert whole.result().json()["generated_text"] == "w" * 30
    assert mortal_service.engine_pid == pid


def test_killing_the_engine_ends_streams_with_an_error(mortal_service: Service) -> None:
    """After kill -9 of the engine a stream ends with an error event within five seconds."""
    pid, restarts = mortal_service.engine_pid, mortal_service.metric("llm_engine_restarts_total")
    with open_stream(mortal_service, generate(LONG)) as found:
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        rest = rest_of(found)
        # Undisturbed it would go on for twenty.
        assert time.monotonic() - killed < 5
    assert rest[-1]["error"]["code"] == "engine_failed"
    assert all(piece_of(event) == "x" for event in rest[:-1])
    check_restarted(mortal_service, pid, restarts + 1)


def test_killing_the_engine_ends_every_request_once(mortal_service: Service) -> None:
    """When the engine is killed, whole and streamed answers end once; none hangs or repeats."""
    pid, restarts = mortal_service.engine_pid, mortal_service.metric("llm_engine_restarts_total")
    first_tokens = mortal_service.metric("llm_time_to_first_token_seconds_count")

    def stream(i: int) -> Streamed:
        with mortal_service.client() as client:
            return read_stream(client, "/v1/generate", generate(LONG + str(i)))

    with ThreadPoolExecutor(8) as pool:
        whole = [pool.submit(ask, mortal_service, generate(LONG + str(i))) for i in range(4)]
        streams = [pool.submit(stream, i) for i in range(4)]
        # A request without a token would be tried once more.
        first_tokens += 8
        mortal_service.wait_for_metric("llm_time_to_first_token_seconds_count", first_tokens)
        os.kill(pid, signal.SIGKILL)
        for answer in whole:
            response = answer.result()
            assert response.status_code == 500
            assert response.json()["error"]["code"] == "engine_failed"
        for future in streams:
            streamed = future.result()
            assert streamed.done
            assert streamed.error is not None
    check_restarted(mortal_service, pid, restarts + 1)


@pytest.mark.parametrize("fault", ["crash", "raise"])
def test_a_crash_in_the_engine_costs_a_restart(fresh_service: Service, fault: str) -> None:
    """A fatal signal or an exception in a step ends that engine process, and another takes over."""
    pid, restarts = fresh_service.engine_pid, fresh_service.metric("llm_engine_restarts_total")
    with fresh_service.client() as client:
        streamed = read_stream(client, "/v1/generate", generate(f"[echo:{fault}]"))
    assert streamed.done
    assert streamed.error is not None
    assert streamed.error["code"] == "engine_failed"
    assert "[echo:" not in str(streamed.error)
    check_restarted(fresh_service, pid, restarts + 1)
    response = ask(fresh_service, generate(f"[echo:{fault}]"))
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_failed")
    fresh_service.wait_until_ready()


# --- Loading --------------------------------------------------------------------


def test_http_answers_while_the_model_loads(tmp_path: Path) -> None:
    """While the model loads, the service is alive, answers 503, and can be stopped."""
    with running_hub() as hub:
        hub.faults.silent = True
        with running_service(
            until="listening",
            MODEL__ENGINE="transformers",
            MODEL__SOURCE="hub",
            MODEL__NAME="owner/model",
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path),
        ) as service:
            assert service.get("/livez").status_code == 200
            ready = service.get("/readyz")
            assert (ready.status_code, ready.json()) == (503, {"status": "loading"})
            health = service.get("/health")
            assert health.status_code == 503
            assert health.json() == {
                "status": "loading",
                "model_loaded": False,
                "model_name": "owner/model",
            }
            for stream in (False, True):
                refused = ask(service, generate("x", stream=stream))
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "model_loading"
                assert int(refused.headers["retry-after"]) >= 1
            assert ask(service, {"prompt": ""}).status_code == 422


@pytest.mark.parametrize("fault", ["nothing", "truncated"])
def test_a_model_that_cannot_be_loaded_ends_the_service(tmp_path: Path, fault: str) -> None:
    """A missing or truncated model ends the service with a status and one line."""
    model = tmp_path / fault
    if fault == "truncated":
        weights = make_tiny_model(model) / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
    with running_service(
        until="started",
        MODEL__ENGINE="transformers",
        MODEL__SOURCE="local",
        MODEL__NAME=str(model),
    ) as service:
        assert service.wait() == 3
        (line,) = [e for e in service.log() if e["level"] == "CRITICAL"]
    assert str(model) in line["message"]
    assert "Traceback" not in str(line)
