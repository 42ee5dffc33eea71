"""A thin HTTP/1.1 client, because client and server share their cores in a measurement.

Pieces of a response are stored with their arrival times and parsed after the round. This takes a
seventh of httpx's time and a third of aiohttp's (docs/adr/0013-benchmark-client.md).
"""

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

# Servers close idle connections (uvicorn after 5 s). A connection that was idle for longer than
# this is not used again, because a request on it could be lost.
_IDLE_SECONDS = 2.0

CONNECTION_LOST = "the connection was lost"


@dataclass(slots=True)
class Exchange:
    """A request and its response. Times are those of ``time.perf_counter``.

    Attributes:
        sent_at: The time to open a connection counts as the response's.
        status: ``None`` without a response.
        headers: Names are in lower case.
        pieces: Arrival time and bytes of each piece of the body.
        failure: Why the response is not complete.
        resent: Whether the request was sent again on a new connection, because the server had
            closed the kept one.
    """

    planned_at: float
    sent_at: float
    status: int | None = None
    headers: dict[bytes, bytes] = field(default_factory=dict)
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended_at: float = 0.0
    failure: str | None = None
    resent: bool = False


class _Connection(asyncio.Protocol):
    """A connection that carries one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._exchange: Exchange | None = None
        self._ended: asyncio.Future[None] | None = None
        self._keep_alive = False
        self._idle_since = time.perf_counter()

    @property
    def is_usable(self) -> bool:
        """Whether another request may be sent on it."""
        if self._transport is None or self._transport.is_closing():
            return False
        return time.perf_counter() - self._idle_since < _IDLE_SECONDS

    async def send(self, message: bytes, exchange: Exchange, time_limit: float) -> None:
        """Send a request and wait for the end of its response; fills ``exchange``."""
        if self._transport is None or self._transport.is_closing():
            self._fail(CONNECTION_LOST, exchange)
            return
        loop = asyncio.get_running_loop()
        self._exchange = exchange
        self._ended = loop.create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(message)
        timer = loop.call_later(
            time_limit, self._end, f"no end of the response within {time_limit:g} s"
        )
        try:
            await self._ended
        finally:
            timer.cancel()
            self._exchange = None
            if not self._keep_alive:
                self.close()

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    def _end(self, failure: str | None = None) -> None:
        if self._ended is None or self._ended.done() or self._exchange is None:
            return
        self._fail(failure, self._exchange)
        self._keep_alive = (
            failure is None and self._parser is not None and self._parser.should_keep_alive()
        )
        self._idle_since = time.perf_counter()
        self._ended.set_result(None)

    @staticmethod
    def _fail(failure: str | None, exchange: Exchange) -> None:
        exchange.failure = failure
        exchange.ended_at = time.perf_counter()

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"the response is not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._exchange is None:
            return
        # A body without a length ends with the connection.
        framed = {b"content-length", b"transfer-encoding"} & self._exchange.headers.keys()
        whole = self._exchange.status is not None and not framed and exc is None
        self._end(None if whole else CONNECTION_LOST)
        self._keep_alive = False

    # --- httptools' callbacks ---

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._exchange is not None:
            self._exchange.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._exchange is not None and self._parser is not None:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._exchange is not None:
            self._exchange.pieces.append((time.perf_counter(), body))

    def on_message_complete(self) -> None:
        self._end()


class HttpClient:
    """Sends requests to a server, with one connection for each concurrent request.

    No method raises when a request fails: the exchange has the failure.

    Args:
        base_url: ``http://host:port`` or ``https://…``, with the path that all routes share.
        time_limit: Timeout of a request in seconds.

    Raises:
        ValueError: ``base_url`` is not such an address.
    """

    def __init__(self, base_url: str, *, time_limit: float) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is not an address: write http://host:port")
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._authority = parts.netloc.rpartition("@")[2]
        self._path = parts.path.rstrip("/")
        self._time_limit = time_limit
        self._idle: list[_Connection] = []

    async def post(
        self, path: str, body: bytes, headers: dict[str, str], planned_at: float | None = None
    ) -> Exchange:
        """Send a POST request and wait for the end of its response."""
        sizes = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        return await self._exchange(self._head("POST", path, sizes | headers) + body, planned_at)

    async def get(self, path: str, headers: dict[str, str] | None = None) -> Exchange:
        """Send a GET request and wait for the end of its response."""
        return await self._exchange(self._head("GET", path, headers or {}), None)

    async def delete(self, path: str, headers: dict[str, str]) -> Exchange:
        """Send a DELETE request and wait for the end of its response."""
        return await self._exchange(self._head("DELETE", path, headers), None)

    def _head(self, method: str, path: str, headers: dict[str, str]) -> bytes:
        lines = {"Host": self._authority, **headers}
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return f"{method} {self._path}{path} HTTP/1.1\r\n{text}\r\n".encode()

    async def _exchange(self, message: bytes, planned_at: float | None) -> Exchange:
        sent_at = time.perf_counter()
        exchange = Exchange(sent_at if planned_at is None else planned_at, sent_at)
        kept = self._kept_connection()
        if kept is not None:
            await kept.send(message, exchange, self._time_limit)
            if kept.is_usable:
                self._idle.append(kept)
            # A server may close a connection between two requests, as llama-server does. It never
            # read the request then, so the request is sent again, as other clients do.
            if exchange.failure != CONNECTION_LOST or exchange.status is not None:
                return exchange
            exchange.failure, exchange.resent = None, True
        try:
            connection = await asyncio.wait_for(self._connect(), self._time_limit)
        except OSError as error:
            exchange.failure = f"no connection: {str(error) or type(error).__name__}"
            exchange.ended_at = time.perf_counter()
            return exchange
        await connection.send(message, exchange, self._time_limit)
        if connection.is_usable:
            self._idle.append(connection)
        return exchange

    def _kept_connection(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            _Connection, self._host, self._port, ssl=self._tls
        )
        return connection

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()
