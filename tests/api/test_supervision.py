"""A running service whose engine process is stopped, hangs, crashes or has no memory."""

import os
import resource
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.live import LONG, STEP, ask, background, generate, open_stream, rest_of
from tests.support.service import Service, running_service
from tests.support.tiny_model import make_tiny_model

linux_only = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="the kernel does not say what a process does"
)


def logged(service: Service, level: str) -> list[dict[str, Any]]:
    """The log's lines of a level."""
    return [line for line in service.log() if line["level"] == level]


@linux_only
def test_a_stopped_engine_is_noticed_and_replaced(slow_service: Service) -> None:
    """An engine that is stopped for three seconds is replaced; its stream ends with an error."""
    restarts = slow_service.metric("llm_engine_restarts_total")
    with open_stream(slow_service, generate(LONG)) as found:
        os.kill(slow_service.engine_pid, signal.SIGSTOP)
        rest = rest_of(found)
    assert rest[-1]["error"]["code"] == "engine_unavailable"
    slow_service.wait_until_ready()
    assert slow_service.metric("llm_engine_restarts_total") == restarts + 1
    assert "it has been stopped for 3 s" in logged(slow_service, "ERROR")[-1]["message"]
    assert ask(slow_service, generate("after")).json()["generated_text"] == "after"


def test_a_service_that_was_suspended_goes_on(slow_service: Service) -> None:
    """A service that was stopped as a whole, as a paused container is, keeps its engine."""
    restarts = slow_service.metric("llm_engine_restarts_total")
    with open_stream(slow_service, generate("x" * 20)) as found:
        os.killpg(slow_service.process.pid, signal.SIGSTOP)
        # Longer than an engine may be stopped while the service runs.
        time.sleep(5)
        os.killpg(slow_service.process.pid, signal.SIGCONT)
        assert rest_of(found)[-1]["finish_reason"] == "stop"
    assert slow_service.metric("llm_engine_restarts_total") == restarts


def test_a_request_that_kills_the_engine_twice_is_given_up_and_named(
    slow_service: Service,
) -> None:
    """A request that kills the engine is tried once more, alone; the log has both of its ids."""
    restarts = slow_service.metric("llm_engine_restarts_total")
    with slow_service.client() as client:
        headers = {"X-Request-ID": "the-poisonous"}
        refused = client.post("/v1/generate", json=generate("[echo:poison]"), headers=headers)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_unavailable"
    slow_service.wait_until_ready()
    assert slow_service.metric("llm_engine_restarts_total") == restarts + 2
    about = [e for e in slow_service.log() if e.get("request_id") == "the-poisonous"]
    told = [(e["level"], e["message"].rpartition(": ")[2]) for e in about if "engine_request" in e]
    assert told == [("WARNING", "it is tried once more"), ("ERROR", "it is given up")]


def test_an_engine_out_of_memory_is_replaced(slow_service: Service) -> None:
    """An engine that cannot allocate dies and is replaced; every request gets a response."""
    restarts = slow_service.metric("llm_engine_restarts_total")
    pid = slow_service.engine_pid
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    # It can allocate nothing beyond what it has.
    resource.prlimit(pid, resource.RLIMIT_AS, (size, size))
    with ThreadPoolExecutor(64) as pool:
        bodies = [generate("x" * 3900 + str(i), max_tokens=10) for i in range(64)]
        answers = list(pool.map(lambda body: ask(slow_service, body), bodies))
    slow_service.wait_until_ready()
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert slow_service.metric("llm_engine_restarts_total") == restarts + 1
    assert slow_service.metric("llm_requests_running") == 0
    assert ask(slow_service, generate("after")).json()["generated_text"] == "after"


@linux_only
def test_a_load_that_hangs_is_started_again(tmp_path: Path) -> None:
    """A load that waits forever, as for a dead network disk, is noticed and started again."""
    model = make_tiny_model(tmp_path / "model")
    weights = model / "model.safetensors"
    shutil.move(weights, tmp_path / "whole")
    os.mkfifo(weights)
    with running_service(
        until="listening",
        MODEL__ENGINE="transformers",
        MODEL__SOURCE="local",
        MODEL__NAME=str(model),
    ) as service:
        service.wait_for_metric("llm_engine_restarts_total", 1)
        (ended,) = logged(service, "ERROR")
        assert "loading the model, it has used no processor and read nothing" in ended["message"]
        weights.unlink()
        shutil.move(tmp_path / "whole", weights)
        service.wait_until_ready()
        assert ask(service, generate("a", max_tokens=2)).status_code == 200


def test_a_crash_loop_ends_the_service() -> None:
    """One crash more than engine.max_restarts ends the service with one line and status 3."""
    with running_service(ENGINE__ECHO_STEP_SECONDS=str(STEP), ENGINE__MAX_RESTARTS="1") as service:
        os.kill(service.engine_pid, signal.SIGKILL)
        service.wait_for_metric("llm_engine_restarts_total", 1)
        service.wait_until_ready()
        with (
            open_stream(service, generate(LONG)) as found,
            background(ask, service, generate(LONG)) as whole,
        ):
            service.wait_for_metric("llm_requests_running", 2)
            os.kill(service.engine_pid, signal.SIGKILL)
            assert rest_of(found)[-1]["error"]["code"] == "engine_unavailable"
            assert whole.result().status_code == 503
        assert service.wait() == 3
        (line,) = logged(service, "CRITICAL")
        assert "died 2 times within 10 minutes (engine.max_restarts is 1)" in line["message"]
        assert "SIGKILL" in line["message"]
