"""A running service whose engine process is stopped, starved, hangs, crashes or has no memory."""

import os
import resource
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.support.live import LONG, STEP, ask, background, generate, open_stream, rest_of
from tests.support.programs import BUSY, PINNED, running
from tests.support.service import API_KEY, Service, running_service
from tests.support.tiny_gguf import make_tiny_gguf

linux_only = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="the kernel does not say what a process does"
)


def logged(service: Service, level: str) -> list[dict[str, Any]]:
    """The log's lines of a level."""
    return [line for line in service.log() if line["level"] == level]


STALL_SECONDS = 1
"""The least that is allowed."""


@pytest.fixture(scope="module")
def watched_service() -> Iterator[Service]:
    """A slow service whose engine process may do nothing for a second only."""
    with running_service(
        ENGINE__ECHO_STEP_SECONDS=str(STEP), ENGINE__STALL_TIMEOUT_SECONDS=str(STALL_SECONDS)
    ) as service:
        yield service


@linux_only
def test_a_stopped_engine_is_noticed_and_replaced(watched_service: Service) -> None:
    """A stopped engine is replaced; its stream ends with an error; log and status say why."""
    restarts = watched_service.metric("llm_engine_restarts_total")
    with open_stream(watched_service, generate(LONG)) as found:
        os.kill(watched_service.engine_pid, signal.SIGSTOP)
        rest = rest_of(found)
    assert rest[-1]["error"]["code"] == "engine_failed"
    watched_service.wait_until_ready()
    assert watched_service.metric("llm_engine_restarts_total") == restarts + 1
    why = f"killed, since it has been stopped for {STALL_SECONDS} s"
    ends = [e["message"] for e in logged(watched_service, "ERROR") if "ended" in e["message"]]
    assert ends[-1] == f"the engine process ended: {why}"
    assert watched_service.get("/status").json()["engine"]["last_end"] == why
    assert ask(watched_service, generate("after")).json()["generated_text"] == "after"


def test_a_service_that_was_suspended_goes_on(watched_service: Service) -> None:
    """A service that was stopped as a whole, as a paused container is, keeps its engine."""
    restarts = watched_service.metric("llm_engine_restarts_total")
    with open_stream(watched_service, generate("x" * 20)) as found:
        os.killpg(watched_service.process.pid, signal.SIGSTOP)
        # Longer than an engine may be stopped while the service runs.
        time.sleep(5 * STALL_SECONDS)
        os.killpg(watched_service.process.pid, signal.SIGCONT)
        assert rest_of(found)[-1]["finish_reason"] == "stop"
    assert watched_service.metric("llm_engine_restarts_total") == restarts


@linux_only
def test_an_engine_that_a_busy_host_starves_goes_on() -> None:
    """An engine that waits for a processor three times as long as a stall takes is not killed."""
    cores = os.sched_getaffinity(0)
    with ExitStack() as busy:
        others = [busy.enter_context(running(PINNED + BUSY)) for _ in range(4)]
        for other in others:
            other.send_signal(signal.SIGSTOP)
        with running_service(
            until="started", ENGINE__STALL_TIMEOUT_SECONDS=str(STALL_SECONDS)
        ) as service:
            service.wait_for(lambda: "engine process started" in service.raw_log(), "the start")
            # From now on it runs on one core, while nothing else wants that.
            for other in others:
                other.send_signal(signal.SIGCONT)
            engine = service.engine_pid
            os.sched_setaffinity(engine, [min(cores)])
            os.sched_setscheduler(engine, os.SCHED_IDLE, os.sched_param(0))
            weigh_session(engine, 19)
            time.sleep(3 * STALL_SECONDS)
            assert service.engine_pids() == [engine]
            assert "ready for requests" not in service.raw_log()
            # So that it can end.
            busy.close()
            weigh_session(engine, 0)
            os.sched_setaffinity(engine, cores)


def weigh_session(process: int, nice: int) -> None:
    """Set the niceness of the process' session, where the kernel shares time out between these."""
    with suppress(OSError):
        Path(f"/proc/{process}/autogroup").write_text(str(nice))


@pytest.fixture(scope="module")
def mortal_service() -> Iterator[Service]:
    """A slow service whose engine dies three times: each start waits longer than the last."""
    with running_service(ENGINE__ECHO_STEP_SECONDS=str(STEP)) as service:
        yield service


def test_a_request_that_kills_the_engine_twice_is_given_up_and_named(
    mortal_service: Service,
) -> None:
    """What kills the engine is tried once more, and not by official clients; the log names it."""
    restarts = mortal_service.metric("llm_engine_restarts_total")
    http = openai.DefaultHttpxClient(trust_env=False)
    with (
        OpenAI(base_url=f"{mortal_service.base_url}/v1", api_key=API_KEY, http_client=http) as sdk,
        pytest.raises(openai.InternalServerError) as refused,
    ):
        sdk.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "[echo:poison]"}],
            extra_headers={"X-Request-ID": "the-poisonous"},
        )
    assert (refused.value.status_code, refused.value.code) == (500, "engine_failed")
    mortal_service.wait_until_ready()
    assert mortal_service.metric("llm_engine_restarts_total") == restarts + 2
    about = mortal_service.lines(
        lambda e: e.get("request_id") == "the-poisonous" and "engine_request" in e, 2
    )
    told = [(e["level"], e["message"].rpartition(": ")[2]) for e in about]
    assert told == [("WARNING", "it is tried once more"), ("ERROR", "it is given up")]


def test_an_engine_out_of_memory_is_replaced(mortal_service: Service) -> None:
    """An engine that cannot allocate dies and is replaced; every request gets a response."""
    restarts = mortal_service.metric("llm_engine_restarts_total")
    pid = mortal_service.engine_pid
    status = Path(f"/proc/{pid}/status").read_text().split()
    size = int(status[status.index("VmData:") + 1]) * 1024
    # It can write to nothing beyond what it has, parts of its address space that are reserved
    # included.
    resource.prlimit(pid, resource.RLIMIT_DATA, (size, size))
    with ThreadPoolExecutor(64) as pool:
        bodies = [generate("x" * 3900 + str(i), max_tokens=10) for i in range(64)]
        answers = list(pool.map(lambda body: ask(mortal_service, body), bodies))
    mortal_service.wait_until_ready()
    assert {answer.status_code for answer in answers} <= {200, 500, 503}
    assert "internal_error" not in {a.json().get("error", {}).get("code") for a in answers}
    assert mortal_service.metric("llm_engine_restarts_total") == restarts + 1
    assert mortal_service.metric("llm_requests_running") == 0
    assert ask(mortal_service, generate("after")).json()["generated_text"] == "after"


@linux_only
def test_a_load_that_hangs_is_started_again(tmp_path: Path) -> None:
    """A load that waits forever, as for a dead network disk, is noticed and started again."""
    whole = make_tiny_gguf(tmp_path / "whole.gguf")
    weights = tmp_path / "model" / "tiny.gguf"
    weights.parent.mkdir()
    os.mkfifo(weights)
    with running_service(
        until="listening",
        MODEL__ENGINE="openvino",
        MODEL__SOURCE="local",
        MODEL__NAME=str(weights.parent),
        ENGINE__STALL_TIMEOUT_SECONDS="3",
    ) as service:
        # The load opens the pipe, and waits for what never comes.
        with weights.open("wb"):
            whole.replace(weights)
            service.wait_for_metric("llm_engine_restarts_total", 1)
            (ended,) = service.lines(lambda e: e["level"] == "ERROR")
        assert "loading the model, it has not used or awaited a processor" in ended["message"]
        service.wait_until_ready()
        assert ask(service, generate("a", max_tokens=2)).status_code == 200


@linux_only
def test_a_load_that_computes_for_ever_ends_the_service(tmp_path: Path) -> None:
    """Past engine.load_timeout_seconds the service ends with one line, and nothing computes on."""
    # One instruction that takes hours and holds the interpreter, so nothing in the process ends it.
    model = make_tiny_gguf(tmp_path / "tiny.gguf", template="{{ 9 ** (9 ** 9) }}")
    with running_service(
        until="listening",
        ENGINE__LOAD_TIMEOUT_SECONDS="4",
        MODEL__ENGINE="openvino",
        MODEL__SOURCE="local",
        MODEL__NAME=str(model),
    ) as service:
        assert service.wait() == 3
        (line,) = logged(service, "CRITICAL")
    assert f"loading {model} with OpenVINO took more than 4 s: " in line["message"]
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert [one for one in commands if str(model).encode() in one] == []


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
            assert rest_of(found)[-1]["error"]["code"] == "engine_failed"
            assert whole.result().status_code == 500
        assert service.wait() == 3
        (line,) = logged(service, "CRITICAL")
        assert "died 2 times within 10 minutes (engine.max_restarts is 1)" in line["message"]
        assert "SIGKILL" in line["message"]
