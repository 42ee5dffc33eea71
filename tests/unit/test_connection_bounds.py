"""Counting connections, and putting the service's protocol under a server."""

import asyncio
import logging
import resource
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from starlette.types import Message
from uvicorn import Config
from uvicorn.lifespan.on import LifespanOn
from uvicorn.server import ServerState

from app.api.application import GuardedApplication
from app.api.server.connections import PROBE_PLACES, Connections
from app.api.server.protocol import GuardedProtocol
from app.core.config.server import ServerSettings
from app.core.metrics import Metrics
from app.core.open_files import allow_open_files
from app.core.rate_limit import ClientAddress


class Wire(asyncio.Transport):
    """A transport that only counts how often it is aborted."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = 0

    def abort(self) -> None:
        """Count."""
        self.aborted += 1


class Fake:
    """A connection that does nothing."""

    def __init__(self, check: Callable[[], None] = lambda: None) -> None:
        self.probes_only = False
        self.is_waiting = True
        self.wire = Wire()
        self.transport: asyncio.Transport = self.wire
        self.checked = asyncio.Event()
        self._check = check

    def check(self) -> None:
        """Say that it was checked."""
        self.checked.set()
        self._check()


def bounds(**settings: float) -> Connections:
    """Connections without anything else of the service."""
    limits = ServerSettings.model_validate(settings)
    return Connections(limits, ClientAddress([]), Metrics())


def opened(connections: Connections, *hosts: str | None) -> list[Fake]:
    """A new connection from each of these addresses."""
    fakes = [Fake() for _ in hosts]
    for fake, host in zip(fakes, hosts, strict=True):
        connections.add(fake, host)
    return fakes


def test_an_ipv6_network_counts_as_one_address() -> None:
    """A client with one IPv6 address has all of its /64 network, and shares that one's bound."""
    connections = bounds(max_connections_per_ip=1)
    addresses = ["2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "fe80::1%eth0", "fe80::2%eth0"]
    mapped = ["::ffff:192.0.2.1", "::ffff:192.0.2.2"]
    fakes = opened(connections, *addresses, *mapped)
    assert [f.probes_only for f in fakes] == [False, True, False, False, True, False, False]


def test_what_has_no_address_is_not_bounded_by_it() -> None:
    """Clients of a Unix socket have no address; a proxy stands in front of them."""
    fakes = opened(bounds(max_connections_per_ip=1), None, None, None)
    assert not any(fake.probes_only for fake in fakes)


def test_an_address_has_its_share_again_when_its_connection_is_gone() -> None:
    """Closed connections do not count, and neither do those that were for probes alone."""
    connections = bounds(max_connections_per_ip=1)
    first, second = opened(connections, "192.0.2.1", "192.0.2.1")
    assert second.probes_only
    connections.remove(second)
    connections.remove(first)
    (third,) = opened(connections, "192.0.2.1")
    assert not third.probes_only


def test_the_connection_that_has_waited_longest_makes_room() -> None:
    """One that is served stays, and so does one that began to wait again later."""
    connections = bounds(max_connections=3)
    served, again, longest = opened(connections, None, None, None)
    served.is_waiting = False
    connections.waits(again)
    (new,) = opened(connections, None)
    assert [fake.wire.aborted for fake in (served, again, longest)] == [0, 0, 1]
    assert not new.probes_only


def test_connections_for_probes_are_few() -> None:
    """Past their number the one that has waited longest makes room, and no other connection."""
    connections = bounds(max_connections=1)
    (served,) = opened(connections, None)
    served.is_waiting = False
    probes = opened(connections, *[None] * (PROBE_PLACES + 1))
    assert all(fake.probes_only for fake in probes)
    assert [fake.wire.aborted for fake in probes] == [1] + [0] * PROBE_PLACES
    assert served.wire.aborted == 0


async def test_a_fault_ends_its_connection_only() -> None:
    """A connection that cannot be checked is ended, and all others are watched further."""

    def fail() -> None:
        raise RuntimeError("a fault of the service")

    connections = bounds(header_timeout_seconds=0.01)
    bad, good = Fake(check=fail), Fake()
    connections.add(bad, None)
    connections.add(good, None)
    watch = asyncio.create_task(connections.watch())
    for _ in range(2):
        async with asyncio.timeout(10):
            await good.checked.wait()
            good.checked.clear()
    watch.cancel()
    assert bad.wire.aborted >= 1
    assert good.wire.aborted == 0


async def test_many_connections_are_checked_in_turns() -> None:
    """While a thousand connections are checked, others of the event loop run several times."""
    connections = bounds(header_timeout_seconds=0.01)
    fakes = opened(connections, *[None] * 1000)
    watch = asyncio.create_task(connections.watch())
    partly = 0
    async with asyncio.timeout(10):
        while not fakes[-1].checked.is_set():
            partly += fakes[0].checked.is_set()
            await asyncio.sleep(0)
    watch.cancel()
    assert partly >= 5


@pytest.mark.parametrize(
    ("soft", "hard", "allowed", "raised"),
    [
        (1024, 1_000_000, 2176, 2176),
        (1024, resource.RLIM_INFINITY, 2176, 2176),
        (1024, 1024, 1024, 1024),
        (4096, 4096, 2176, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 2176, None),
    ],
)
def test_the_limit_of_open_files_is_raised_where_needed(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, allowed: int, raised: int | None
) -> None:
    """The process asks for as many open files as it may need, and takes what it gets."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    assert allow_open_files(2176) == allowed
    assert asked == ([] if raised is None else [(raised, hard)])


async def test_there_are_no_more_connections_than_open_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the process may not open enough files, fewer connections have places."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (130, 130))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    connections = bounds()
    watch = asyncio.create_task(connections.watch())
    await asyncio.sleep(0)
    oldest, *others = opened(connections, None, None, None)
    watch.cancel()
    assert oldest.wire.aborted == 1
    assert [fake.wire.aborted for fake in others] == [0, 0]


# --- Under a server -------------------------------------------------------------------------------


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Config]:
    """The configuration of a server that has begun the lifespan of an application."""
    config = Config(
        GuardedApplication(connections=bounds()), lifespan="on", log_config=None, **options
    )
    config.load()
    lifespan = LifespanOn(config)
    await lifespan.startup()
    yield config
    await lifespan.shutdown()


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The service's warnings."""
    told: list[str] = []
    monkeypatch.setattr(logging.getLogger("llm_service"), "warning", told.append)
    return told


async def test_every_start_of_uvicorn_is_guarded(warnings: list[str]) -> None:
    """The lifespan puts the protocol into the configuration of the server that runs it."""
    async with running(http="httptools") as config:
        make = cast("Any", config.http_protocol_class)
        protocol = make(config=config, server_state=ServerState(), app_state={})
    assert isinstance(protocol, GuardedProtocol)
    assert warnings == []


@pytest.mark.parametrize(
    ("options", "address"),
    [
        ({"host": "0.0.0.0"}, "http://localhost:8000/"),  # noqa: S104 - nothing listens
        ({"host": "::1", "port": 9000}, "http://[::1]:9000/"),
        ({"host": "gpu.example", "port": 80}, "http://gpu.example:80/"),
        ({"port": 0}, None),
        ({"uds": "/run/service.sock"}, None),
    ],
)
async def test_the_address_is_that_of_the_server(
    options: dict[str, Any], address: str | None
) -> None:
    """However uvicorn is started, the application knows where a person finds it."""
    async with running(http="httptools", **options) as config:
        assert cast("GuardedApplication", config.app).address == address


async def test_a_server_that_cannot_be_guarded_is_told(warnings: list[str]) -> None:
    """Another protocol, or another server, stays as it is, and a warning says so."""
    async with running(http="h11") as config:
        assert config.http_protocol_class.__name__ == "H11Protocol"
    assert len(warnings) == 1
    events: asyncio.Queue[Message] = asyncio.Queue()
    for event in ("startup", "shutdown"):
        events.put_nowait({"type": f"lifespan.{event}"})
    app = GuardedApplication(connections=bounds())
    await app({"type": "lifespan"}, events.get, asyncio.Queue[Message]().put)
    assert len(warnings) == 2
    assert "connections are not bounded" in warnings[1]


async def test_a_flag_that_does_nothing_is_told(warnings: list[str]) -> None:
    """A warning names the setting that counts instead of uvicorn's own keep-alive."""
    async with running(http="httptools", timeout_keep_alive=60):
        pass
    assert "server.keep_alive_seconds" in warnings[0]
