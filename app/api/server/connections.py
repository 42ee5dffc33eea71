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
_PROBES = "probes"
_OTHER_FILES = PROBE_PLACES + 96  # Open files for probes, the engine and logs.


class Connection(Protocol):
    """What is asked of a connection."""

    probes_only: bool
    transport: asyncio.Transport

    @property
    def is_waiting(self) -> bool:
        """Whether the service does no work for it."""

    def check(self) -> None:
        """Close what has taken longer than it may."""


class Connections:
    """The open connections of the process."""

    def __init__(self, limits: ServerSettings, addresses: ClientAddress, metrics: Metrics) -> None:
        self.limits = limits
        self.dropped = metrics.connections_dropped
        self._addresses = addresses
        self._max = limits.max_connections
        # What each counts as, an address or probes, if it is bounded by that; in the order in which
        # they last began to wait.
        self._open: dict[Connection, str | None] = {}
        self._counts: Counter[str | None] = Counter()
        metrics.connections_open.set_function(lambda: len(self._open))

    def add(self, connection: Connection, host: str | None) -> None:
        """Count a client's new connection, and set whether it may carry nothing but probes."""
        share, counted = self.limits.max_connections_per_ip, None
        # Clients of a Unix socket have no address, and a trusted proxy has those of many.
        if share and host is not None and not self._addresses.is_trusted(host):
            counted = counted_by(host)
        has_share = counted is None or self._counts[counted] < (share or 0)
        is_full = len(self._open) - self._counts[_PROBES] >= self._max
        has_place = has_share and (not is_full or self._evict("evicted", probes_only=False))
        connection.probes_only = not has_place
        self._open[connection] = counted = counted if has_place else _PROBES
        self._counts[counted] += 1
        if self._counts[_PROBES] > PROBE_PLACES:
            self._evict("limit", probes_only=True)

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has been closed."""
        if connection in self._open:
            counted = self._open.pop(connection)
            self._counts[counted] -= 1
            if not self._counts[counted]:
                del self._counts[counted]

    def waits(self, connection: Connection) -> None:
        """The connection begins to wait now."""
        if connection in self._open:
            self._open[connection] = self._open.pop(connection)

    async def watch(self) -> None:
        """Close the connections whose time is over; runs until it is cancelled."""
        self._max = max(1, allow_open_files(self._max + _OTHER_FILES) - _OTHER_FILES)
        pause = self.limits.shortest_timeout / 5
        while True:
            await asyncio.sleep(pause)
            for number, connection in enumerate(list(self._open)):
                if number % 100 == 0:
                    # Serve other connections. Sockets are read after timers: two turns.
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                try:
                    connection.check()
                except Exception:
                    # One connection's fault must not end the watch on all others.
                    log.exception("a connection could not be checked")
                    connection.transport.abort()

    def _evict(self, reason: str, *, probes_only: bool) -> bool:
        """Close the connection that has waited longest; ``False`` if none waits."""
        for connection in self._open:
            if connection.is_waiting and connection.probes_only is probes_only:
                self.remove(connection)
                self.dropped.labels(reason).inc()
                connection.transport.abort()
                return True
        return False
