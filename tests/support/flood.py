"""A flood of connections that never become requests, with probes meanwhile."""

import resource
import selectors
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice

import pytest

from tests.support.raw import KEY, LIVEZ, RawClient, post
from tests.support.service import Service

# Open files of this process beside the connections.
_OTHER_FILES = 200
# Seconds after which the test gives up on a connection.
_PATIENCE = 60.0
# Seconds between two probes.
_PAUSE = 0.02

# What the clients send, in turn, before they fall silent.
_BEGINNINGS = (
    b"",
    LIVEZ[:9],
    LIVEZ[:-2],
    post(KEY, "Content-Length: 100", body=b'{"prompt": '),
    post("Content-Length: 100", body=b'{"prompt": '),
    # This one is answered, and then kept for the next request.
    LIVEZ,
)


@dataclass
class Flood:
    """The outcome of a flood.

    Attributes:
        longest_open: Seconds from a client's last byte to its connection's end, at most.
        probes: Seconds that each probe of /livez took, on a connection of its own.
    """

    longest_open: float = 0.0
    probes: list[float] = field(default_factory=list)


def flooded(service: Service, count: int) -> Flood:
    """Open ``count`` connections, and wait until the service has ended them all."""
    flood = Flood()
    with _files(count + _OTHER_FILES), _probing(service, flood.probes), ExitStack() as stack:
        clients: dict[RawClient, float] = {}
        for beginning in islice(cycle(_BEGINNINGS), count):
            client = stack.enter_context(RawClient(service))
            client.send(beginning)
            clients[client] = time.monotonic()
        flood.longest_open = _until_all_have_ended(clients)
    # The one that reads the metric.
    service.wait_for_metric("http_connections_open", 1)
    service.wait_for_metric("llm_requests_running", 0)
    return flood


@contextmanager
def _files(count: int) -> Iterator[None]:
    """Allow this process this number of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.fail(f"this needs {count} open files, and `ulimit -Hn` says {hard}")
    if soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def _probing(service: Service, seconds: list[float]) -> Iterator[None]:
    """Ask /livez again and again on a thread; a probe without an answer fails the test."""
    enough = threading.Event()
    faults: list[BaseException] = []

    def probe() -> None:
        try:
            while not enough.wait(_PAUSE):
                started = time.monotonic()
                with RawClient(service) as client:
                    assert client.ask(LIVEZ).status == 200
                seconds.append(time.monotonic() - started)
        except BaseException as error:  # noqa: BLE001 - raised again below
            faults.append(error)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()
    if faults:
        raise faults[0]


def _until_all_have_ended(clients: dict[RawClient, float]) -> float:
    """Longest time in seconds from a client's last byte to the end of its connection."""
    longest = 0.0
    left = time.monotonic() + _PATIENCE
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ, client)
        while selector.get_map():
            for key, _ in selector.select(1.0):
                if key.data.ended():
                    longest = max(longest, time.monotonic() - clients[key.data])
                    selector.unregister(key.fileobj)
            assert time.monotonic() < left, f"{len(selector.get_map())} are still open"
    return longest
