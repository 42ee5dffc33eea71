"""All open connections: how many there may be, and which one makes room for the next.

A connection *waits* while nothing of the service works for it: before its first request, between
two requests, while it brings the head of one, and while it ends. Whoever has no key can hold a
connection only in that state. So when all places are taken the connection that has waited longest
is closed for a new one, and a flood of idle connections only pushes out itself. Where every
connection is being served, a new one is still taken, for the probes of a health check alone.
"""

import asyncio
import ipaddress
import resource
from collections import Counter
from typing import Protocol

from app.core.config.server import ServerSettings
from app.core.logging import get_logger
from app.core.metrics import Metrics
from app.core.rate_limit import ClientAddress

log = get_logger()

# Connections beyond the bounds that are open at a time, to be asked by probes alone.
PROBE_PLACES = 32
# Files and sockets beside the connections within the bounds: those for probes, the engine, logs.
_OTHER_DESCRIPTORS = PROBE_PLACES + 96


class Connection(Protocol):
    """What is asked of a connection."""

    address: str | None
    probes_only: bool

    def check(self, now: float) -> None:
        """Close what has taken longer than it may; ``now`` is the event loop's time."""

    def make_room(self) -> None:
        """Close at once; nobody is being served."""

    def abort(self) -> None:
        """Close at once, and forget what has not been sent."""


class Connections:
    """The open connections of the process.

    Attributes:
        limits: The settings.
        metrics: Where what becomes of connections is counted.
    """

    def __init__(
        self,
        limits: ServerSettings,
        addresses: ClientAddress,
        metrics: Metrics,
    ) -> None:
        self.limits = limits
        self.metrics = metrics
        self._addresses = addresses
        self._most = limits.max_connections
        self._open: set[Connection] = set()
        # Those that are within the bounds.
        self._places: set[Connection] = set()
        self._of_address: Counter[str] = Counter()
        # Both in the order in which the waiting began; the values mean nothing.
        self._waiting: dict[Connection, None] = {}
        self._waiting_probes: dict[Connection, None] = {}

    def add(self, connection: Connection) -> None:
        """Count a new connection, which waits; says so where it may carry nothing but probes."""
        address = connection.address = self._counted(connection.address)
        connection.probes_only = self._is_too_many_of(address) or self._is_one_too_many()
        self._open.add(connection)
        if not connection.probes_only:
            self._places.add(connection)
            if address is not None:
                self._of_address[address] += 1
        self.waits(connection)
        if len(self._waiting_probes) > PROBE_PLACES:
            _oldest(self._waiting_probes).make_room()
        self.metrics.connections_open.set(len(self._open))

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has been closed."""
        if connection not in self._open:
            return
        self._open.remove(connection)
        self.serves(connection)
        address = connection.address
        if connection in self._places:
            self._places.remove(connection)
            if address is not None:
                self._of_address[address] -= 1
                if not self._of_address[address]:
                    del self._of_address[address]
        self.metrics.connections_open.set(len(self._open))

    def waits(self, connection: Connection) -> None:
        """The connection waits from now on."""
        self.serves(connection)
        if connection not in self._open:
            return
        queue = self._waiting_probes if connection.probes_only else self._waiting
        queue[connection] = None

    def serves(self, connection: Connection) -> None:
        """The connection has a request that is being answered."""
        self._waiting.pop(connection, None)
        self._waiting_probes.pop(connection, None)

    def drops(self, reason: str) -> None:
        """Count a connection that the service ends for a reason of its own."""
        self.metrics.connections_dropped.labels(reason).inc()

    async def watch(self) -> None:
        """Close the connections whose time is over; runs until it is cancelled."""
        self._most = _allowed(self._most)
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.limits.shortest_timeout / 5)
            # Timers come before sockets: where the process was held up, what has come meanwhile
            # is read first.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            now = loop.time()
            for connection in list(self._open):
                self._check(connection, now)

    def _check(self, connection: Connection, now: float) -> None:
        try:
            connection.check(now)
        except Exception:
            # One connection's fault must not leave all others without a watch.
            log.exception("a connection could not be checked")
            connection.abort()

    def _counted(self, host: str | None) -> str | None:
        """What connections are counted by: an IPv4 address or an IPv6 network; or not at all."""
        if host is None or self.limits.max_connections_per_ip is None:
            return None
        if self._addresses.is_trusted(host):
            return None
        address = ipaddress.ip_address(host.partition("%")[0])
        if isinstance(address, ipaddress.IPv4Address) or address.ipv4_mapped is not None:
            return host
        # Whoever has one IPv6 address has the 2⁶⁴ of its network.
        return str(ipaddress.ip_network((address, 64), strict=False))

    def _is_too_many_of(self, address: str | None) -> bool:
        most = self.limits.max_connections_per_ip
        return address is not None and most is not None and self._of_address[address] >= most

    def _is_one_too_many(self) -> bool:
        """Whether there is no place left, and none that could be freed."""
        if len(self._places) < self._most:
            return False
        if not self._waiting:
            return True
        _oldest(self._waiting).make_room()
        return False


def _oldest(queue: dict[Connection, None]) -> Connection:
    return next(iter(queue))


def _allowed(connections: int) -> int:
    """As many of these connections as the process may have open, after asking for enough.

    Shells start programs with a limit of 1,024 for the sake of those that use ``select``; this
    one does not.
    """
    wanted = connections + _OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    allowed = max(soft - _OTHER_DESCRIPTORS, 1)
    log.warning("the process may open %d files: at most %d connections", soft, allowed)
    return allowed
