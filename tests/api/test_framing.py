"""Framing: where one request ends and the next begins, whatever a client sends."""

import re
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.live import LONG, SOON, generate
from tests.support.raw import KEY, LIVEZ, RawClient, chunked, generate_request, post, request
from tests.support.service import API_KEY, Service

BODY = b'{"prompt": "hi"}'
LENGTH = f"Content-Length: {len(BODY)}"
CHUNKED = "Transfer-Encoding: chunked"
SMUGGLED = request("GET", "/health", "X-Request-ID: smuggled")


# --- Malformed requests ---------------------------------------------------------------------------

MALFORMED = {
    "length and chunks": post("Content-Length: 4", CHUNKED, body=b"0\r\n\r\n"),
    "chunks and length": post(CHUNKED, "Content-Length: 4", body=b"0\r\n\r\n"),
    "two lengths": post("Content-Length: 3", "Content-Length: 5", body=b"abc"),
    "the same length twice": post("Content-Length: 3", "Content-Length: 3", body=b"abc"),
    "a list of lengths": post("Content-Length: 3, 3", body=b"abc"),
    "a signed length": post("Content-Length: +3", body=b"abc"),
    "a length over 64 bits": post("Content-Length: 18446744073709551619", body=b"abc"),
    "chunks inside out": post("Transfer-Encoding: chunked, gzip", body=chunked(b"abc")),
    "an unknown coding": post("Transfer-Encoding: xchunked", body=chunked(b"abc")),
    "a coding behind a blank": post("Transfer-Encoding: \x0bchunked", body=chunked(b"abc")),
    "a blank before the colon": post("Transfer-Encoding : chunked", body=chunked(b"abc")),
    "a folded header": post("X-A: b\r\n c", LENGTH, body=BODY),
    "a folded coding": post("Transfer-Encoding:\r\n chunked", body=chunked(b"abc")),
    "line feeds alone": LIVEZ.replace(b"\r\n", b"\n"),
    "a carriage return alone": request("GET", "/livez", "X-A: b\rX-C: d"),
    "a null byte": request("GET", "/livez", "X-A: b\0c"),
    "a header without colon": request("GET", "/livez", "nonsense"),
    "no host": request("GET", "/livez", host=""),
    "two hosts": request("GET", "/livez", "Host: other"),
    "another version": LIVEZ.replace(b"1.1", b"2.0"),
    "no version": b"GET /livez\r\n\r\n",
    "a tunnel": b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a tunnel to a path": request("CONNECT", "/livez"),
    "no HTTP": b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"\0" * 100,
    "a signed chunk": post(CHUNKED, body=b"+3\r\nabc\r\n0\r\n\r\n"),
    "a chunk with line feeds": post(CHUNKED, body=b"3\nabc\n0\n\n"),
    "a chunk longer than it says": post(CHUNKED, body=b"3\r\nabcdef\r\n0\r\n\r\n"),
    "a chunk over 64 bits": post(CHUNKED, body=b"10000000000000003\r\nabc\r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_ends_the_connection(echo_service: Service, name: str) -> None:
    """Framing that two servers could read in two ways gets 400, and nothing behind it is read."""
    with RawClient(echo_service) as client:
        client.send(MALFORMED[name] + SMUGGLED)
        answer = client.answer()
        assert (answer.status, answer.code) == (400, "malformed_http")
        assert answer.headers["connection"] == "close"
        assert client.rest() == b""


ENDLESS = {
    "header": (b"GET /livez HTTP/1.1\r\nHost: a\r\nX-A: ", b"x" * 1000),
    "headers": (b"GET /livez HTTP/1.1\r\nHost: a\r\n", b"X-A: b\r\n" * 100),
    "address": (b"GET /", b"x" * 1000),
    "trailer": (post(CHUNKED, KEY, body=b"0\r\nX-A: "), b"x" * 1000),
    "chunk extension": (post(CHUNKED, KEY, body=b"1;a="), b"x" * 1000),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_has_no_end_is_ended(echo_service: Service, name: str) -> None:
    """A head, a trailer or a chunk extension without an end is rejected."""
    start, piece = ENDLESS[name]
    with RawClient(echo_service) as client:
        client.send(start)
        with suppress(ConnectionError):
            client.send(*[piece] * 200)
        assert client.answer().status in (400, 431)


FAULTS = {
    "garbage": b"\0garbage\r\n\r\n",
    "a body": post(KEY, CHUNKED, body=b"3\r\nabcdef\r\n"),
    "a body behind others": LIVEZ + post(KEY, CHUNKED, body=b"3\r\nabcdef\r\n"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_waits_for_the_answer_before_it(echo_service: Service, name: str) -> None:
    """A request in front of malformed bytes is answered, and then the connection ends."""
    with RawClient(echo_service) as client:
        client.send(generate_request(generate("first")) + FAULTS[name] + SMUGGLED)
        answer = client.answer()
        assert b"first" in answer.body
        assert answer.headers["connection"] == "close"
        assert client.rest() == b""


def test_trailers_are_no_headers(echo_service: Service) -> None:
    """Trailers are ignored: they give neither an API key nor a request id."""
    trailers = f"{KEY}\r\nX-Request-ID: trailer\r\n".encode()
    with RawClient(echo_service) as client:
        answer = client.ask(post(CHUNKED, body=chunked(BODY, trailers=trailers)))
        assert answer.status == 401
        assert answer.headers["x-request-id"] != "trailer"
        assert client.ask(LIVEZ).status == 200


def test_blanks_around_a_value_are_no_part_of_it(echo_service: Service) -> None:
    """A key, a request id and a length with spaces and tabs around them are those without."""
    padded = (f"X-API-Key: \t {API_KEY} \t ", "X-Request-ID:padded-1\t", f"{LENGTH} ")
    with RawClient(echo_service) as client:
        answer = client.ask(post(*padded, body=BODY))
        assert (answer.status, answer.headers["x-request-id"]) == (200, "padded-1")
        bearer = f"Authorization:  Bearer {API_KEY} \t"
        assert client.ask(post(bearer, LENGTH, body=BODY)).status == 200


@pytest.mark.parametrize("wish", ["h2c", "websocket", "TLS/1.0"])
def test_a_wish_for_another_protocol_is_ignored(echo_service: Service, wish: str) -> None:
    """A request to upgrade is answered as if it did not ask, with its body, and so is the next."""
    headers = [
        "Connection: Upgrade, HTTP2-Settings",
        f"Upgrade: {wish}",
        "HTTP2-Settings: AAMAAABk",
    ]
    with RawClient(echo_service) as client:
        for framing, body in ((LENGTH, BODY), (CHUNKED, chunked(BODY))):
            client.send(post(KEY, *headers, framing, body=body) + LIVEZ)
            assert b'"generated_text":"hi"' in client.answer().body
            assert client.answer().status == 200


# --- Rejections before the body is read -----------------------------------------------------------

# A rejected body that looks like a request, as a whole and cut in two.
TRAP = SMUGGLED + b" " * 1000


@pytest.mark.parametrize("pause", [0.0, 0.05], ids=["at once", "in pieces"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_the_request_behind_a_rejection_is_answered(
    echo_service: Service, framing: str, pause: float
) -> None:
    """After an early 401 the rest of the body is skipped, and the connection goes on."""
    if framing == "length":
        refused = post(f"Content-Length: {len(TRAP)}", body=TRAP)
    else:
        refused = post(CHUNKED, body=chunked(TRAP[:40], TRAP[40:]))
    middle = refused.index(b"\r\n\r\n") + 30
    with RawClient(echo_service) as client:
        for _ in range(3):
            client.send(refused[:middle], refused[middle:] + LIVEZ, pause=pause)
            assert client.answer().status == 401
            answer = client.answer()
            assert answer.body == b'{"status":"alive"}'
            assert answer.headers["x-request-id"] != "smuggled"


@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_body_over_the_limit_is_413_to_the_end(echo_service: Service, framing: str) -> None:
    """A client that sends too much can read its 413, and nothing behind is read as a request."""
    piece = b"x" * 65_536
    with RawClient(echo_service) as client:
        client.send(post(KEY, "Content-Length: 99999999" if framing == "length" else CHUNKED))
        with suppress(ConnectionError):
            for _ in range(100):
                client.send(piece if framing == "length" else b"10000\r\n" + piece + b"\r\n")
        answer = client.answer()
        assert (answer.status, answer.code) == (413, "body_too_large")
        assert answer.headers["connection"] == "close"
        assert b"HTTP/1.1" not in client.rest()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak to be had")
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_a_body_over_the_limit_takes_no_memory(echo_service: Service, framing: str) -> None:
    """A rejected body of 200 MB never takes more than 5 MiB of the API process's memory."""
    echo_service.get("/livez")
    process = Path(f"/proc/{echo_service.process.pid}")
    # This resets the peak (proc_pid_clear_refs(5)).
    (process / "clear_refs").write_text("5")
    before = _kib(process, "VmHWM")
    assert _refused_body(echo_service, framing, 200) == 413
    assert _kib(process, "VmHWM") - before < 5 * 1024


def _refused_body(service: Service, framing: str, megabytes: int) -> int:
    """The status of a request whose client sends all of its body, whatever the answer."""
    piece = b"x" * 1_000_000
    announced = f"Content-Length: {megabytes * len(piece)}"
    with RawClient(service) as client:
        client.send(post(KEY, announced if framing == "length" else CHUNKED))
        with suppress(ConnectionError):
            for _ in range(megabytes):
                client.send(piece if framing == "length" else b"f4240\r\n" + piece + b"\r\n")
        return client.head()[0]


def _kib(process: Path, name: str) -> int:
    status = (process / "status").read_text()
    return int(re.findall(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[0])


def test_a_rejection_instead_of_100_ends_the_connection(echo_service: Service) -> None:
    """A client that expected 100 and got 401 may send its body or not, so the connection ends."""
    with RawClient(echo_service) as client:
        answer = client.ask(post("Expect: 100-continue", f"Content-Length: {len(SMUGGLED)}"))
        assert (answer.status, answer.headers["connection"]) == (401, "close")
        with suppress(ConnectionError):
            client.send(SMUGGLED)
        assert client.rest() == b""


def test_an_expected_100_comes_before_the_body(echo_service: Service) -> None:
    """A client with a key gets 100, then its answer, and keeps the connection."""
    with RawClient(echo_service) as client:
        for _ in range(2):
            client.send(post(KEY, LENGTH, "Expect: 100-continue"))
            assert client.answer().status == 100
            assert client.ask(BODY).status == 200


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz"])
def test_probes_answer_head(echo_service: Service, path: str) -> None:
    """HEAD is GET without the body, and the connection goes on."""
    with RawClient(echo_service) as client:
        client.send(request("HEAD", path))
        answer = client.answer(method="HEAD")
        assert answer.status == 200
        assert len(client.ask(request("GET", path)).body) == int(answer.headers["content-length"])


# --- Clients that leave ---------------------------------------------------------------------------

LEFT_AT = {
    "the start": b"",
    "half a head": b"POST /v1/generate HTTP/1.1\r\nHos",
    "no body": post(KEY, LENGTH),
    "half a body": post(KEY, LENGTH, body=BODY[:5]),
    "half a chunk": post(KEY, CHUNKED, body=b"ff\r\nabc"),
    "an answer": generate_request(generate(LONG)),
    "a stream": generate_request(generate(LONG, stream=True)),
    "an answer, others behind it": generate_request(generate(LONG)) + LIVEZ * 3,
    "a stream, others behind it": generate_request(generate(LONG, stream=True)) + LIVEZ * 3,
}


@pytest.mark.parametrize("name", LEFT_AT)
def test_a_client_may_leave_at_any_point(slow_service: Service, name: str) -> None:
    """Whenever a client leaves, its place is freed and no error is logged."""
    errors = [e for e in slow_service.log() if e["level"] in ("ERROR", "CRITICAL")]
    with RawClient(slow_service) as client:
        client.send(LEFT_AT[name])
        if LONG.encode() in LEFT_AT[name]:
            slow_service.wait_for_metric("llm_requests_running", 1)
        else:
            time.sleep(0.05)
    assert slow_service.wait_for_metric("llm_requests_running", 0) < SOON
    # The one that reads the metric.
    slow_service.wait_for_metric("http_connections_open", 1)
    assert [e for e in slow_service.log() if e["level"] in ("ERROR", "CRITICAL")] == errors


@pytest.mark.parametrize("behind", [16, 17])
def test_sixteen_requests_may_wait_behind_a_stream(slow_service: Service, behind: int) -> None:
    """Pipelined requests are answered in order; one too many ends the connection after one."""
    with RawClient(slow_service) as client:
        client.send(generate_request(generate("abc", stream=True)))
        client.send(*[LIVEZ] * behind)
        assert client.answer().body.endswith(b"data: [DONE]\n\n")
        if behind > 16:
            assert client.rest() == b""
        else:
            assert [client.answer().status for _ in range(behind)] == [200] * behind
            assert client.ask(LIVEZ).status == 200
