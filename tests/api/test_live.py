"""Clients that stream, that leave, and that are more than there are places.

Everything runs as in production: uvicorn, its engine process, and real sockets. The echo engine
takes a fixed time for a token, so an answer's length decides how long it takes.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest

from tests.conftest import RunApp
from tests.support.asgi import Leaving, http_scope
from tests.support.live import (
    FEW_TOKENS,
    FIRST_TOKENS,
    LONG,
    SOON,
    STEP,
    Gauges,
    ask,
    background,
    generate,
    open_stream,
    rest_of,
    tokens_until_free,
)
from tests.support.raw import RawClient, generate_request
from tests.support.service import API_KEY, Service, running_service
from tests.support.sse import DONE, data_lines, piece_of, read_stream


@pytest.fixture(scope="module")
def narrow() -> Iterator[Service]:
    """A service that runs one request, lets one wait, and takes 50 ms for a token."""
    with running_service(
        ENGINE__ECHO_STEP_SECONDS=str(STEP), ENGINE__MAX_RUNNING="1", ENGINE__MAX_WAITING="1"
    ) as service:
        yield service


# --- Streams over real sockets --------------------------------------------------------------------


def test_pieces_come_one_by_one(slow_service: Service) -> None:
    """A stream's pieces are sent as they are generated, not when the answer is complete."""
    with open_stream(slow_service, generate("abcdef")) as found:
        assert slow_service.metric("llm_requests_running") == 1
        rest = rest_of(found)
    assert "".join(piece_of(event) or "" for event in rest) == "bcdef"


def test_a_characters_bytes_are_never_split(slow_service: Service) -> None:
    """Characters of several bytes, each a token here, arrive whole."""
    prompt = "aé🌍字\u200d👩"
    with slow_service.client() as client:
        streamed = read_stream(client, "/v1/generate", generate(prompt))
    assert streamed.pieces == list(prompt)
    assert streamed.done
    assert streamed.last["finish_reason"] == "stop"


def test_a_rejection_comes_before_the_stream(narrow: Service) -> None:
    """A request that is rejected at admission has an error status, also with stream: true."""
    with narrow.client() as client:
        response = client.post("/v1/generate", json=generate("x" * 5000, stream=True))
        assert response.status_code == 422
        response = client.post("/v1/generate", json=generate("x", stream=True, max_tokens=600))
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "max_tokens"


# --- Clients that leave ---------------------------------------------------------------------------


def test_leaving_a_stream_frees_its_slot(slow_service: Service) -> None:
    """A client that leaves a long stream frees its slot within a step."""
    cancelled = slow_service.metric("llm_requests_cancelled_total")
    with open_stream(slow_service, generate(LONG)):
        assert slow_service.metric("llm_requests_running") == 1
    assert slow_service.wait_for_metric("llm_requests_running", 0) < SOON
    assert slow_service.metric("llm_requests_cancelled_total") == cancelled + 1
    tokens = slow_service.metric("tokens_generated_total")
    time.sleep(4 * STEP)
    assert slow_service.metric("tokens_generated_total") == tokens


def test_leaving_stops_the_engine_too(run_app: RunApp) -> None:
    """The engine process too stops working for a client that has left."""
    client = run_app(engine={"echo_step_seconds": STEP})
    engine = client.app.state.services.engine  # type: ignore[attr-defined]
    leaving = Leaving(json.dumps(generate(LONG, stream=True)).encode())
    scope = http_scope("POST", "/v1/generate", {"X-API-Key": API_KEY})
    running = []

    async def send(message: Any) -> None:
        running.append(engine.stats.running)
        await leaving.send(message)

    assert client.portal is not None
    client.portal.call(client.app, scope, leaving.receive, send)
    left = time.monotonic()
    assert 1 in running
    while engine.stats.running:
        assert time.monotonic() - left < SOON
        time.sleep(STEP)


def test_leaving_a_whole_answer_frees_its_slot(slow_service: Service) -> None:
    """A client that stops waiting for an unstreamed answer frees its slot within a step."""
    cancelled = slow_service.metric("llm_requests_cancelled_total")
    with RawClient(slow_service) as client:
        client.send(generate_request(generate(LONG)))
        slow_service.wait_for_metric("llm_requests_running", 1)
    assert slow_service.wait_for_metric("llm_requests_running", 0) < SOON
    assert slow_service.metric("llm_requests_cancelled_total") == cancelled + 1


def test_leaving_the_queue_frees_the_place(narrow: Service) -> None:
    """A client that leaves while it waits frees its place, and the running one is not disturbed."""
    with open_stream(narrow, generate("x" * 30)) as found:
        with RawClient(narrow) as waiting:
            waiting.send(generate_request(generate(LONG)))
            narrow.wait_for_metric("llm_requests_waiting", 1)
        narrow.wait_for_metric("llm_requests_waiting", 0)
        assert narrow.metric("llm_requests_running") == 1
        rest = rest_of(found)
    assert rest[-1]["tokens_generated"] == 31
    narrow.wait_for_metric("llm_requests_running", 0)


def test_leaving_a_queued_stream_frees_the_place(narrow: Service) -> None:
    """A stream that has been admitted and waits for its turn frees its place when it is left."""
    with open_stream(narrow, generate("x" * 30)) as found:
        with RawClient(narrow) as waiting:
            waiting.send(generate_request(generate(LONG, stream=True)))
            narrow.wait_for_metric("llm_requests_waiting", 1)
        narrow.wait_for_metric("llm_requests_waiting", 0)
        assert rest_of(found)[-1]["finish_reason"] == "stop"
    narrow.wait_for_metric("llm_requests_running", 0)


def test_a_place_is_free_a_few_tokens_after_leaving(narrow: Service) -> None:
    """Left while it is queued or generated: a few tokens later all gauges are back."""

    def decoding(before: Gauges, now: Gauges) -> bool:
        return now[FIRST_TOKENS] > before[FIRST_TOKENS]

    def queued(_: Gauges, now: Gauges) -> bool:
        return now["llm_requests_waiting"] == 1

    assert tokens_until_free(narrow, generate(LONG), decoding) < FEW_TOKENS
    with open_stream(narrow, generate(LONG)):
        assert tokens_until_free(narrow, generate(LONG), queued) < FEW_TOKENS
    narrow.wait_for_metric("llm_requests_running", 0)


# --- Full queues and deadlines --------------------------------------------------------------------


def test_the_third_of_two_places_is_503(narrow: Service) -> None:
    """With every place taken a request is rejected, and those inside are not disturbed."""
    rejected = narrow.metric("llm_requests_rejected_total", reason="overloaded")
    with RawClient(narrow) as waiting:
        # It takes 20 seconds, so that a rejection which waited for it would be noticed.
        with open_stream(narrow, generate(LONG)) as running:
            waiting.send(generate_request(generate("www")))
            narrow.wait_for_metric("llm_requests_waiting", 1)
            for stream in (False, True):
                answer = ask(narrow, generate("x", stream=stream))
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == "overloaded"
                assert int(answer.headers["retry-after"]) >= 1
            # A full queue is no reason to send callers elsewhere.
            assert narrow.get("/readyz").status_code == 200
            assert piece_of(next(running)) == "x"
        assert b'"generated_text":"www"' in waiting.answer().body
    assert narrow.metric("llm_requests_rejected_total", reason="overloaded") == rejected + 2


def test_requests_get_their_turn_in_the_order_they_came(narrow: Service) -> None:
    """The request that waits runs as soon as the running one has ended."""
    with (
        open_stream(narrow, generate("x" * 10)) as first,
        background(ask, narrow, generate("y")) as second,
    ):
        narrow.wait_for_metric("llm_requests_waiting", 1)
        assert rest_of(first)[-1]["finish_reason"] == "stop"
        assert second.result().status_code == 200


def test_a_request_past_its_deadline_is_504() -> None:
    """The deadline ends a request while it runs or waits, and frees its place."""
    with running_service(
        # The long answer takes four times the limit, the short one a twentieth of it.
        ENGINE__ECHO_STEP_SECONDS="0.01",
        ENGINE__REQUEST_TIMEOUT_SECONDS="1",
        ENGINE__MAX_RUNNING="1",
    ) as service:
        response = ask(service, generate(LONG))
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
        with service.client() as client:
            streamed = read_stream(client, "/v1/generate", generate(LONG))
        assert streamed.done
        assert streamed.error is not None
        assert streamed.error["code"] == "deadline_exceeded"
        assert LONG.startswith(streamed.text)
        assert streamed.text
        service.wait_for_metric("llm_requests_running", 0)
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda _: ask(service, generate(LONG)), range(2)))
        assert [a.status_code for a in answers] == [504, 504]
        assert ask(service, generate("short")).status_code == 200


def test_a_malformed_request_does_not_stop_the_service(slow_service: Service) -> None:
    """Garbage on a socket ends that connection only."""
    for garbage in (b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/chat HTTP/1.1\r\n\r\n"):
        with RawClient(slow_service) as client:
            client.send(garbage)
            client.rest()
    assert ask(slow_service, generate(str(uuid4()))).status_code == 200


def test_the_stream_ends_with_done_and_nothing_after(slow_service: Service) -> None:
    """The last line of every stream is [DONE], and the connection serves the next request."""
    with slow_service.client() as client:
        for _ in range(2):
            body = generate("ab", stream=True)
            text = client.post("/v1/generate", json=body).text
            assert list(data_lines(text.split("\n")))[-1] == DONE
            assert text.endswith("data: [DONE]\n\n")
