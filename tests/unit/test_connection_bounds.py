"""Counting connections, and putting the service's protocol under a server."""

import asyncio
import logging
import resource
from collections.abc import Callable

import pytest
from uvicorn import Config
from uvicorn.lifespan.on import LifespanOn
from uvicorn.server import ServerState

from app.api.server import connections as module
from app.api.server.connections import Connections
from app.core.config.server import ServerSettings
from app.core.metrics import Metrics
from app.core.rate_limit import ClientAddress
from app.main import create_app
from tests.conftest import make_settings


class Fake:
    """A connection that only counts what is done to it."""

    def __init__(
        self, address: str | None = None, check: Callable[[], None] = lambda: None
    ) -> None:
        self.address = address
        self.probes_only = False
        self.aborted = 0
        self.checked = asyncio.Event()
        self._check = check

    def check(self, now: float) -> None:
        self.checked.set()
        self._check()

    def make_room(self) -> None:
        raise AssertionError("there was room")

    def abort(self) -> None:
        self.aborted += 1


def bounds(**settings: float) -> Connections:
    """Connections without anything else of the service."""
    limits = ServerSettings.model_validate(settings)
    return Connections(limits, ClientAddress([]), Metrics())


def test_an_ipv6_network_counts_as_one_address() -> None:
    """Whoever has one address of IPv6 has all of its /64 network, and shares that one's bound."""
    connections = bounds(max_connections_per_ip=1)
    addresses = ["2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "fe80::1%eth0", "fe80::2%eth0"]
    fakes = [Fake(address) for address in addresses]
    for fake in fakes:
        connections.add(fake)
    assert [fake.probes_only for fake in fakes] == [False, True, False, False, True]


def test_what_has_no_address_is_not_bounded_by_it() -> None:
    """Clients of a Unix socket have no address; a proxy stands in front of them."""
    connections = bounds(max_connections_per_ip=1)
    fakes = [Fake() for _ in range(3)]
    for fake in fakes:
        connections.add(fake)
    assert not any(fake.probes_only for fake in fakes)


async def test_a_fault_ends_its_connection_only() -> None:
    """A connection that cannot be checked is ended, and all others are watched further."""

    def fail() -> None:
        raise RuntimeError("a fault of the service")

    connections = bounds(header_timeout_seconds=0.01)
    bad, good = Fake(check=fail), Fake()
    connections.add(bad)
    connections.add(good)
    watch = asyncio.create_task(connections.watch())
    for _ in range(2):
        async with asyncio.timeout(10):
            await good.checked.wait()
            good.checked.clear()
    watch.cancel()
    assert bad.aborted >= 1
    assert good.aborted == 0


@pytest.mark.parametrize(
    ("soft", "hard", "allowed", "raised"),
    [
        (1024, 1_000_000, 2048, 2176),
        (1024, resource.RLIM_INFINITY, 2048, 2176),
        (1024, 1024, 896, 1024),
        (4096, 4096, 2048, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 2048, None),
    ],
)
def test_the_limit_of_open_files_is_raised_where_needed(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, allowed: int, raised: int | None
) -> None:
    """The process asks for as many open files as it may need, and takes what it gets."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    assert module._allowed(2048) == allowed
    assert asked == ([] if raised is None else [(raised, hard)])


async def test_every_start_of_uvicorn_is_guarded() -> None:
    """The lifespan puts the protocol into the configuration that it finds, with the settings."""
    app = create_app(make_settings(server={"keep_alive_seconds": 75}))
    config = Config(app, http="httptools", log_config=None)
    config.load()
    lifespan = LifespanOn(config)
    assert app._install(lifespan.receive)  # type: ignore[attr-defined]
    protocol = config.http_protocol_class(config, ServerState(), {})  # type: ignore[call-arg]
    assert protocol._limits.keep_alive_seconds == 75  # type: ignore[attr-defined]


def test_a_server_that_cannot_be_guarded_is_left_alone() -> None:
    """Another protocol, or another server, stays as it is."""
    app = create_app(make_settings())
    config = Config(app, http="h11", log_config=None)
    config.load()
    assert not app._install(LifespanOn(config).receive)  # type: ignore[attr-defined]
    assert not app._install(asyncio.Queue[int]().get)  # type: ignore[attr-defined]


def test_a_flag_that_does_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sets uvicorn's own keep-alive learns which setting counts."""
    told: list[str] = []
    monkeypatch.setattr(logging.getLogger("llm_service"), "warning", told.append)
    app = create_app(make_settings())
    config = Config(app, timeout_keep_alive=60, log_config=None)
    config.load()
    assert app._install(LifespanOn(config).receive)  # type: ignore[attr-defined]
    assert "server.keep_alive_seconds" in told[0]
