"""The open connections: how many there may be, and which one is closed to make room.

A connection *waits* while the service does no work for it: before and between requests, and while a
head comes. A client without a key can hold a connection only in that state. So when all places are
taken, the connection that has waited longest is closed for a new one, and a flood of connections
only displaces itself. When none waits, a new connection may carry a health probe and nothing else.
"""

import asyncio
from collections import Counter
from typing import Protocol

from app.core.config.server import ServerSettings
from app.core.logging import get_logger
from app.core.metrics import Metrics
from app.core.open_files import allow_open_files
from app.core.rate_limit import ClientAddress, counted_by

log = get_logger()

# Connections beyond the bounds that are open at a time, for probes alone.
PROBE_PLACES = 32
# Open files beside the connections within the bounds: those for probes, the engine, logs.
_OTHER_FILES = PROBE_PLACES + 96


class Connection(Protocol):
    """What is asked of a connection."""

    probes_only: bool
    transport: asyncio.Transport

    @property
    def is_waiting(self) -> bool:
        """Whether the service does no work for it."""

    def check(self, now: float) -> None:
        """Close what has taken longer than it may; ``now`` is the event loop's time."""


class Connections:
    """The open connections of the process."""

    def __init__(self, limits: ServerSettings, addresses: ClientAddress, metrics: Metrics) -> None:
        self.limits = limits
        self._addresses = addresses
        self._metrics = metrics
        self._max = limits.max_connections
        # What each is counted by, if it is; in the order in which they last began to wait.
        self._open: dict[Connection, str | None] = {}
        self._by_address: Counter[str | None] = Counter()
        self._probes = 0

    def add(self, connection: Connection, host: str | None) -> None:
        """Count a client's new connection, and set whether it may carry nothing but probes."""
        share = self.limits.max_connections_per_ip
        address = self._counted_by(host) if share else None
        has_share = address is None or self._by_address[address] < (share or 0)
        is_full = len(self._open) - self._probes >= self._max
        has_place = not is_full or (has_share and self._evict("evicted", probes_only=False))
        connection.probes_only = not (has_share and has_place)
        self._open[connection] = address = None if connection.probes_only else address
        self._by_address[address] += 1
        self._probes += connection.probes_only
        if self._probes > PROBE_PLACES:
            self._evict("limit", probes_only=True)
        self._metrics.connections_open.set(len(self._open))

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has been closed."""
        if connection in self._open:
            address = self._open.pop(connection)
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]
            self._probes -= connection.probes_only
            self._metrics.connections_open.set(len(self._open))

    def waits(self, connection: Connection) -> None:
        """The connection begins to wait now."""
        if connection in self._open:
            self._open[connection] = self._open.pop(connection)

    def drops(self, reason: str) -> None:
        """Count a connection that the service ends for ``reason``."""
        self._metrics.connections_dropped.labels(reason).inc()

    async def watch(self) -> None:
        """Close the connections whose time is over; runs until it is cancelled."""
        self._max = max(1, allow_open_files(self._max + _OTHER_FILES) - _OTHER_FILES)
        loop, interval = asyncio.get_running_loop(), self.limits.shortest_timeout / 5
        while True:
            await asyncio.sleep(interval)
            # Timers run before sockets are read. If the process was held up, what has come
            # meanwhile is to be read first.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            for connection in list(self._open):
                try:
                    connection.check(loop.time())
                except Exception:
                    # One connection's fault must not end the watch on all others.
                    log.exception("a connection could not be checked")
                    connection.transport.abort()

    def _evict(self, reason: str, *, probes_only: bool) -> bool:
        """Close the connection that has waited longest; ``False`` if none waits."""
        for connection in self._open:
            if connection.is_waiting and connection.probes_only is probes_only:
                self.remove(connection)
                self.drops(reason)
                connection.transport.abort()
                return True
        return False

    def _counted_by(self, host: str | None) -> str | None:
        """An IPv4 address or an IPv6 network; ``None`` for trusted proxies and Unix sockets."""
        if host is None or self._addresses.is_trusted(host):
            return None
        return counted_by(host)
