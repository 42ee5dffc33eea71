"""Stopping the service, by a signal or by kill -9."""

import os
import signal
import socket
import threading
import time

import httpx
import pytest

from tests.support.live import (
    LONG,
    LONG_SECONDS,
    STEP,
    ask,
    background,
    generate,
    open_stream,
    rest_of,
)
from tests.support.raw import KEY, LIVEZ, RawClient, generate_request, large_answers, post
from tests.support.service import API_KEY, Service, running_service
from tests.support.sse import piece_of

# A service that has been told to stop takes longer only if it finishes its work.
HALF_OF_THE_WORK = LONG_SECONDS / 2


def test_sigterm_lets_streams_finish() -> None:
    """After SIGTERM new work gets 503 on an open port, and running requests are finished.

    The engine process gets the signal, too, as from a service manager that sends it to all.
    """
    with running_service(ENGINE__ECHO_STEP_SECONDS=str(STEP)) as service:
        with (
            open_stream(service, generate("x" * 40)) as found,
            background(ask, service, generate("w" * 40)) as whole,
        ):
            service.wait_for_metric("llm_requests_running", 2)
            os.killpg(service.process.pid, signal.SIGTERM)
            service.wait_for(lambda: service.get("/readyz").status_code == 503, "not ready")
            assert service.get("/health").json()["status"] == "draining"
            assert service.get("/livez").status_code == 200
            refused = ask(service, generate("x"))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) >= 1
            # A pooled connection that stayed open would be closed during its next request.
            assert refused.headers["connection"] == "close"
            rest = rest_of(found)
            assert whole.result().json()["generated_text"] == "w" * 40
        assert "".join(piece_of(event) or "" for event in rest) == "x" * 39
        assert rest[-1]["finish_reason"] == "stop"
        assert service.wait() == 0
        assert not service.survivors()


def test_what_is_left_after_the_grace_ends_with_an_error() -> None:
    """When the grace is over, a stream ends with an error event and a whole answer with 503."""
    with running_service(
        ENGINE__ECHO_STEP_SECONDS=str(STEP), APP__SHUTDOWN_GRACE_SECONDS="0.3"
    ) as service:
        with (
            open_stream(service, generate(LONG)) as found,
            background(ask, service, generate(LONG)) as whole,
        ):
            service.wait_for_metric("llm_requests_running", 2)
            started = time.monotonic()
            service.process.terminate()
            rest = rest_of(found)
            assert rest[-1]["error"]["code"] == "draining"
            response = whole.result()
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "draining"
        assert service.wait() == 0
        assert time.monotonic() - started < HALF_OF_THE_WORK


def test_an_idle_service_stops_at_once() -> None:
    """Ctrl-C ends an idle service with status 0; an idle connection does not delay it."""
    with running_service() as service, service.client() as client:
        client.get("/livez")
        service.process.send_signal(signal.SIGINT)
        assert service.wait() == 0
        assert not service.survivors()


def test_a_second_signal_ends_at_once() -> None:
    """A second signal ends the service at once, and no process is left."""
    with running_service(ENGINE__ECHO_STEP_SECONDS=str(STEP)) as service:
        with background(_ignored, service, LONG):
            service.wait_for_metric("llm_requests_running", 1)
            service.process.send_signal(signal.SIGINT)
            service.wait_for(lambda: service.get("/readyz").status_code == 503, "not ready")
            started = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            assert service.wait() == -signal.SIGTERM
        service.wait_for(lambda: not service.survivors(), "the end of the engine", 5)
        assert time.monotonic() - started < HALF_OF_THE_WORK


def test_a_half_sent_request_does_not_hold_up_the_end() -> None:
    """The service waits for a half-sent request no longer than its grace."""
    with running_service(APP__SHUTDOWN_GRACE_SECONDS="0.3") as service:
        host, port = service.base_url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as half:
            half.sendall(
                f"POST /v1/generate HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {API_KEY}\r\n"
                "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{".encode()
            )
            service.wait_for(lambda: service.get("/livez").status_code == 200, "an answer")
            started = time.monotonic()
            assert service.terminate() == 0
            assert time.monotonic() - started < 20


GRACE = 0.5
STAYING = {
    "a stream": generate_request(generate(LONG, stream=True)),
    "an answer": generate_request(generate(LONG)),
    "half a body": post(KEY, "Content-Length: 100", body=b"{"),
    "half a head": LIVEZ[:9],
    "unread answers": large_answers(stream=False),
    "an idle connection": LIVEZ,
}


@pytest.mark.full_size
@pytest.mark.parametrize("name", STAYING)
def test_the_exit_is_within_the_grace_and_two_seconds(name: str) -> None:
    """A client that never leaves does not keep the process, which exits with status 0."""
    with (
        running_service(
            ENGINE__ECHO_STEP_SECONDS=str(STEP), APP__SHUTDOWN_GRACE_SECONDS=str(GRACE)
        ) as service,
        RawClient(service, receive_buffer=4096) as client,
    ):
        client.send(STAYING[name])
        time.sleep(1)
        started = time.monotonic()
        assert service.terminate() == 0
        seconds = time.monotonic() - started
    print(f"{name}: {seconds:.2f} s, of which {GRACE} s of grace")  # noqa: T201 - the answer of `make failures`
    assert seconds < GRACE + 2


def test_an_idle_service_answers_for_the_time_of_notice() -> None:
    """An idle service says that it is not ready until a balancer can have noticed."""
    with running_service(APP__SHUTDOWN_NOTICE_SECONDS="1") as service:
        service.process.terminate()
        service.wait_for(lambda: service.get("/readyz").status_code == 503, "not ready", 5)
        assert service.wait() == 0


@pytest.mark.parametrize("busy", [False, True], ids=["stopped", "at work"])
def test_the_engine_does_not_outlive_a_killed_service(busy: bool) -> None:
    """When the service is killed with -9, its engine process ends, whether at work or stopped."""
    with running_service(ENGINE__ECHO_STEP_SECONDS=str(STEP)) as service:
        if busy:
            threading.Thread(target=_ignored, args=(service, LONG), daemon=True).start()
            service.wait_for_metric("llm_requests_running", 1)
        else:
            os.kill(service.engine_pid, signal.SIGSTOP)
        assert any(str(service.engine_pid) in line for line in service.survivors())
        service.process.kill()
        service.wait()
        service.wait_for(lambda: not service.survivors(), "the end of the engine", 5)


def _ignored(service: Service, prompt: str) -> None:
    try:
        ask(service, generate(prompt))
    except httpx.TransportError:
        return
