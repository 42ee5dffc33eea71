"""Time and number of connections: idle and slow ones are ended, and probes are always answered."""

import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.flood import flooded
from tests.support.live import LONG, STEP, generate, open_stream
from tests.support.raw import KEY, LIVEZ, RawClient, generate_request, large_answers, post, request
from tests.support.service import Service, running_service
from tests.support.sse import piece_of

# Seconds of every timeout of the impatient service.
SHORT = 0.5
# Twenty times as long: a connection that is still open then would never have been closed.
LATE = 10.0
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def impatient() -> Iterator[Service]:
    """A service with short timeouts."""
    with running_service(
        SERVER__HEADER_TIMEOUT_SECONDS=str(SHORT),
        SERVER__BODY_TIMEOUT_SECONDS=str(SHORT),
        SERVER__KEEP_ALIVE_SECONDS=str(SHORT),
        SERVER__SEND_TIMEOUT_SECONDS=str(SHORT),
    ) as service:
        yield service


@pytest.fixture(scope="module")
def narrow_door() -> Iterator[Service]:
    """A service with four connections, three for one address, and long timeouts."""
    hour = "3600"
    with running_service(
        ENGINE__ECHO_STEP_SECONDS=str(STEP),
        SERVER__HEADER_TIMEOUT_SECONDS=hour,
        SERVER__KEEP_ALIVE_SECONDS=hour,
        SERVER__MAX_CONNECTIONS="4",
        SERVER__MAX_CONNECTIONS_PER_IP="3",
        SECURITY__TRUSTED_PROXIES='["127.0.0.9", "127.0.0.1"]',
    ) as service:
        yield service


def dropped(service: Service, reason: str) -> float:
    """Connections that the service has ended for this reason."""
    return service.metric("http_connections_dropped_total", reason=reason)


# --- Time -----------------------------------------------------------------------------------------


def test_a_silent_connection_is_closed(impatient: Service) -> None:
    """A client that connects and sends nothing is closed without a response."""
    with RawClient(impatient) as client:
        assert client.rest() == b""


@pytest.mark.parametrize("piece", [b"a", b"\r\nX-B: c", b"a: b\r\n"])
def test_a_head_that_drips_is_ended(impatient: Service, piece: bytes) -> None:
    """A head that never ends closes its connection, however steadily its bytes come (slowloris)."""
    count = dropped(impatient, "header_timeout")
    with RawClient(impatient) as client:
        client.send(b"GET /livez HTTP/1.1\r\nHost: a\r\nX-A: ")
        client.drip(piece)
    assert dropped(impatient, "header_timeout") == count + 1


def test_line_breaks_are_no_request(impatient: Service) -> None:
    """Empty lines, which are allowed before a request, do not keep a connection open."""
    count = dropped(impatient, "header_timeout")
    with RawClient(impatient) as client:
        client.ask(LIVEZ)
        client.drip(b"\r\n")
    assert dropped(impatient, "header_timeout") == count + 1


@pytest.mark.parametrize(
    ("framing", "piece"),
    [("Content-Length: 9999", b" "), ("Transfer-Encoding: chunked", b"1\r\n \r\n")],
)
def test_a_body_that_drips_is_ended(impatient: Service, framing: str, piece: bytes) -> None:
    """A body that never ends gets 408, and the handler that waits for it is told."""
    count = dropped(impatient, "body_timeout")
    left = impatient.metric("http_requests_total", status="499")
    with RawClient(impatient) as client:
        client.send(post(KEY, framing), piece)
        answer = client.answer()
        assert (answer.status, answer.code) == (408, "request_timeout")
        client.drip(piece)
    assert dropped(impatient, "body_timeout") == count + 1
    assert impatient.metric("http_requests_total", status="499") == left + 1


def test_a_large_body_has_the_time_it_takes(impatient: Service) -> None:
    """A body that arrives steadily may take longer than a small one."""
    body = b" " * 200_000
    with RawClient(impatient) as client:
        # The bytes so far have added twelve seconds to its deadline.
        client.send(post(KEY, f"Content-Length: {len(body)}"), body[:-2])
        time.sleep(2 * SHORT)
        client.send(body[-2:])
        assert client.answer().code == "invalid_json"


@pytest.mark.parametrize("late_body", [b"", b"x" * 1000])
def test_an_idle_connection_is_closed(impatient: Service, late_body: bytes) -> None:
    """A connection without a next request is closed, also after a rejected body that came late."""
    with RawClient(impatient) as client:
        answer = client.ask(post(f"Content-Length: {len(late_body)}"))
        assert answer.status == 401
        assert "connection" not in answer.headers
        client.send(late_body)
        assert client.rest() == b""


def test_time_in_which_the_service_stands_still_does_not_count(impatient: Service) -> None:
    """Requests that arrive while the process is stopped are answered after it, not timed out."""
    with RawClient(impatient) as idle, RawClient(impatient) as begun:
        assert idle.ask(LIVEZ).status == 200
        begun.send(LIVEZ[:9])
        impatient.process.send_signal(signal.SIGSTOP)
        try:
            idle.send(LIVEZ)
            begun.send(LIVEZ[9:])
            time.sleep(3 * SHORT)
        finally:
            impatient.process.send_signal(signal.SIGCONT)
        assert idle.answer().status == 200
        assert begun.answer().status == 200


def test_a_rejected_body_that_drips_is_ended(impatient: Service) -> None:
    """The rest of a rejected body may not come for ever."""
    with RawClient(impatient) as client:
        assert client.ask(post("Content-Length: 9999")).status == 401
        client.drip(b"x")


def is_warning(line: dict[str, Any]) -> bool:
    """Whether a line of the log is a warning."""
    return bool(line["level"] == "WARNING")


@pytest.mark.parametrize("stream", [False, True], ids=["answers", "streams"])
def test_a_reader_that_takes_nothing_is_dropped(impatient: Service, *, stream: bool) -> None:
    """A client that does not read its stream or answer is dropped; one warning, and no error."""
    count, told = dropped(impatient, "send_timeout"), len(impatient.lines(is_warning, 0))
    with RawClient(impatient, receive_buffer=4096) as client:
        client.send(large_answers(stream=stream))
        impatient.wait_for(lambda: dropped(impatient, "send_timeout") > count, "the drop")
        # The one that reads the metric.
        impatient.wait_for_metric("http_connections_open", 1)
    impatient.wait_for_metric("llm_requests_running", 0)
    assert dropped(impatient, "send_timeout") == count + 1
    (line,) = impatient.lines(is_warning, told + 1)[told:]
    assert line["message"] == "a client took nothing of its answer in time and was dropped"
    assert [e for e in impatient.log() if e["level"] in ("ERROR", "CRITICAL")] == []


def test_a_reader_that_takes_nothing_does_not_hold_up_the_end() -> None:
    """SIGTERM ends the service after its grace, also if a client does not read."""
    hour = "3600"
    with (
        running_service(
            APP__SHUTDOWN_GRACE_SECONDS="0.2",
            SERVER__SEND_TIMEOUT_SECONDS=hour,
            SERVER__KEEP_ALIVE_SECONDS="1",
        ) as service,
        RawClient(service, receive_buffer=4096) as client,
    ):
        client.send(large_answers(stream=False))
        service.wait_for(
            lambda: service.metric("http_requests_total", endpoint=CHAT) > 0, "an answer"
        )
        started = time.monotonic()
        service.terminate()
        assert time.monotonic() - started < LATE


def test_two_thousand_idle_connections_hold_up_no_probe(impatient: Service) -> None:
    """Silent and half-sent connections are all closed, and every probe meanwhile is answered."""
    flood = flooded(impatient, 2000)
    assert flood.longest_open < LATE
    assert len(flood.probes) > 20


@pytest.mark.full_size
def test_ten_thousand_idle_connections_hold_up_no_probe() -> None:
    """With the default timeouts all are closed within 10 s; the p99 of /livez is below 250 ms."""
    with running_service(SERVER__MAX_CONNECTIONS="10100") as service:
        flood = flooded(service, 10_000)
    p99 = statistics.quantiles(flood.probes, n=100)[98]
    print(  # noqa: T201 - the answer of `make failures`
        f"open for {flood.longest_open:.1f} s at most; {len(flood.probes)} probes,"
        f" p99 {p99 * 1000:.0f} ms, slowest {max(flood.probes) * 1000:.0f} ms"
    )
    assert flood.longest_open < 10
    assert p99 < 0.25


@pytest.mark.full_size
def test_a_reader_has_thirty_seconds() -> None:
    """With the default timeout a stream's reader that takes nothing is dropped after 30 s."""
    with (
        running_service() as service,
        RawClient(service, receive_buffer=4096) as client,
    ):
        client.send(large_answers(stream=True))
        seconds = service.wait_for(lambda: dropped(service, "send_timeout") == 1, "the drop", 60)
        service.wait_for_metric("llm_requests_running", 0)
    print(f"dropped after {seconds:.1f} s")  # noqa: T201 - the answer of `make failures`
    assert 29 < seconds < 40


# --- Number ---------------------------------------------------------------------------------------


def test_the_longest_idle_connection_makes_room(narrow_door: Service) -> None:
    """With every place taken, a new client is served, and the longest waiting one is closed."""
    count = dropped(narrow_door, "evicted")
    with ExitStack() as stack:
        clients = [stack.enter_context(RawClient(narrow_door)) for _ in range(4)]
        # The first one is used again last, so the second one has waited longest.
        for client in (*clients[1:], clients[0]):
            assert client.ask(LIVEZ).status == 200
        fifth = stack.enter_context(RawClient(narrow_door))
        assert fifth.ask(LIVEZ).status == 200
        assert clients[1].rest() == b""
        for client in (clients[0], *clients[2:]):
            assert client.ask(LIVEZ).status == 200
    narrow_door.wait_for_metric("http_connections_open", 1)
    assert dropped(narrow_door, "evicted") > count


def test_with_every_connection_busy_probes_are_answered(narrow_door: Service) -> None:
    """When no connection can be closed for it, a new one is answered for probes, else with 503."""
    with ExitStack() as stack:
        streams = [stack.enter_context(open_stream(narrow_door, generate(LONG))) for _ in range(4)]
        # These are more than there are places for probes.
        silent = [stack.enter_context(RawClient(narrow_door)) for _ in range(50)]
        for path in ("/livez", "/readyz", "/health"):
            probe = stack.enter_context(RawClient(narrow_door))
            answer = probe.ask(request("GET", path))
            assert answer.status == 200
            assert answer.headers["connection"] == "close"
        other = stack.enter_context(RawClient(narrow_door))
        refused = other.ask(generate_request(generate("y")))
        assert (refused.status, refused.code) == (503, "too_many_connections")
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-request-id"].startswith("req-")
        assert other.rest() == b""
        assert silent[0].rest() == b""
        for stream in streams:
            assert piece_of(next(stream)) is not None
    with RawClient(narrow_door) as client:
        assert client.ask(generate_request(generate("z"))).status == 200


def test_one_address_has_its_share_only(narrow_door: Service) -> None:
    """Past its share an address gets no further connection, but other addresses do."""
    with ExitStack() as stack:
        mine = [stack.enter_context(RawClient(narrow_door, source="127.0.0.2")) for _ in range(4)]
        assert mine[3].ask(request("GET", "/status", KEY)).code == "too_many_connections"
        assert mine[0].ask(request("GET", "/status", KEY)).status == 200
        theirs = stack.enter_context(RawClient(narrow_door, source="127.0.0.3"))
        assert theirs.ask(request("GET", "/status", KEY)).status == 200
        mine[1].close()
        assert mine[0].ask(LIVEZ).status == 200
        again = stack.enter_context(RawClient(narrow_door, source="127.0.0.2"))
        assert again.ask(request("GET", "/status", KEY)).status == 200


def test_a_trusted_proxy_has_no_share(narrow_door: Service) -> None:
    """The bound does not apply to a trusted proxy, whose address all its clients have."""
    with ExitStack() as stack:
        clients = [
            stack.enter_context(RawClient(narrow_door, source="127.0.0.9")) for _ in range(4)
        ]
        for client in clients:
            assert client.ask(request("GET", "/status", KEY)).status == 200
