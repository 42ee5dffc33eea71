"""uvicorn's protocol with strict framing and a deadline for all that a client can hold open.

See docs/adr/0020-connections.md.
"""

import asyncio
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import httptools
from starlette.types import Message, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.middleware import last_response
from app.api.server.connections import Connections
from app.core.logging import get_logger
from app.utils import errors

log = get_logger()

PROBES = frozenset({b"/health", b"/livez", b"/readyz"})
# Bytes that the parser may hold back without reporting anything: heads, trailers, extensions.
_MAX_HEAD_BYTES = 65_536
# Requests that may wait behind the one that is being answered.
_MAX_PIPELINED = 16
# A body that comes at this rate, in bytes a second, may take any time.
_SLOWEST_BODY = 16_384
_LINGER_SECONDS = 2.0


class _Transport:
    """Counts what is written, and leaves to ``on_close`` how the connection is closed."""

    def __init__(self, transport: asyncio.Transport, on_close: Callable[[], None]) -> None:
        self._transport, self._on_close = transport, on_close
        self.written, self._is_closed = 0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self.is_closing():
            self.written += len(data)
            self._transport.write(data)

    def is_closing(self) -> bool:
        return self._is_closed or self._transport.is_closing()

    def close(self) -> None:
        if not self.is_closing():
            self._is_closed = True
            self._on_close()


async def _send_without_chunks(cycle: Any, send: Send, message: Message) -> None:
    """Send a response over HTTP/1.0; without a length it ends where uvicorn closes."""
    cycle.chunked_encoding = False
    # uvicorn would compare the pieces with a length that the head may not have.
    cycle.expected_content_length = len(message.get("body", b""))
    await send(message)


class GuardedProtocol(HttpToolsProtocol):
    """One connection of a client, as uvicorn makes them."""

    cycle: Any  # The request that came last; None before the first.
    transport: Any  # A _Transport.

    def __init__(self, connections: Connections, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.probes_only = False
        self._all = connections
        self._answering: Any = None  # The request whose answer is not complete.
        # When the connection is closed, and the reason if the client has taken too long.
        self._deadline, self._reason = math.inf, ""
        # Bytes that the client had taken when it last took some, and when that was.
        self._taken, self._taken_at = 0, self.loop.time()
        self._unused_bytes = 0  # since the parser last reported something
        self._is_stopped = False

    @property
    def is_waiting(self) -> bool:
        """Whether the service does no work for it."""
        return self._answering is None or self.transport.is_closing()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        self._socket = transport
        super().connection_made(cast("Any", _Transport(transport, self._close)))
        self._all.add(self, self.client[0] if self.client else None)
        self._wait(self._all.limits.header_timeout_seconds, "header_timeout")

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone; the request that is being answered is told."""
        self._all.remove(self)
        self.cycle = self._answering or self.cycle
        super().connection_lost(exc)

    def _close(self) -> None:
        if self._is_stopped or (self.cycle and self.cycle.more_body):
            # Closing a socket while the client sends resets it, and the answer may be lost. So
            # what the client still sends is read and discarded for a while.
            self._wait(_LINGER_SECONDS)
            if self._socket.can_write_eof():
                self._socket.write_eof()
            self.flow.resume_reading()
        else:
            self._socket.close()

    def _wait(self, seconds: float, reason: str = "") -> None:
        self._deadline, self._reason = self.loop.time() + seconds, reason
        self._all.waits(self)

    def _go_on(self) -> None:
        if self._answering is None:
            if not self.cycle.more_body:
                self._wait(self._all.limits.keep_alive_seconds)
        elif self._answering.more_body:
            self._wait(self._all.limits.body_timeout_seconds, "body_timeout")
        else:
            self._wait(math.inf)

    def check(self) -> None:
        """Close what has taken longer than it may."""
        now, unsent = self.loop.time(), self._socket.get_write_buffer_size()
        taken = self.transport.written - unsent
        if not unsent or taken > self._taken:
            self._taken, self._taken_at = taken, now
        if now - self._taken_at >= self._all.limits.send_timeout_seconds:
            log.warning("a client took nothing of its answer in time and was dropped")
            self._all.dropped.labels("send_timeout").inc()
            self._socket.abort()
        elif now < self._deadline or self._socket.is_closing():
            return
        elif self._reason == "body_timeout":
            self._reject(errors.RequestTimeoutError(), self._reason)
        else:
            if self._reason:
                self._all.dropped.labels(self._reason).inc()
            self._socket.close()

    def timeout_keep_alive_handler(self) -> None:
        """Leave idle connections to :meth:`check`, before which what has come is read."""

    def data_received(self, data: bytes) -> None:
        """Parse what has come."""
        if self._is_stopped or self.transport.is_closing():
            return
        if self._answering is None and not self._reason:
            self._wait(self._all.limits.header_timeout_seconds, "header_timeout")
        self._unused_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as found:
            # The parser stops behind a head that asks for another protocol. A server may ignore
            # the wish (RFC 9110, 7.8), so the head is read once more without it.
            version = self.parser.get_http_version().encode()
            lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
            lines += [b"%s: %s" % pair for pair in self.headers if pair[0] != b"upgrade"]
            self.data_received(b"\r\n".join([*lines, b"", data[found.args[0] :]]))
        except httptools.HttpParserError:
            self._reject(errors.MalformedHTTPError(), "malformed")
        else:
            if self._unused_bytes > _MAX_HEAD_BYTES:
                self._reject(errors.HeadersTooLargeError(), "headers_too_large")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; the parser leaves the blanks behind a value, which are no part of it."""
        super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        """Start the request, or let it wait for those before it; an error stops the parser."""
        is_tunnel = self.parser.get_method() == b"CONNECT"
        if self.parser.should_upgrade() and not is_tunnel:
            return
        framing = self.parser.get_http_version(), [name for name, _ in self.headers].count(b"host")
        if is_tunnel or framing not in (("1.1", 1), ("1.0", 1), ("1.0", 0)):
            raise ValueError("a tunnel, not HTTP/1.1, or not one Host")
        is_refused = self.probes_only and self.url.partition(b"?")[0] not in PROBES
        if is_refused or len(self.pipeline) == _MAX_PIPELINED:
            self._reject(errors.TooManyConnectionsError(), "limit")
            raise ValueError("too many connections, or requests that wait")
        self.expect_100_continue &= framing[0] != "1.0"  # which has no "100 Continue"
        super().on_headers_complete()
        if framing[0] == "1.0":
            self.cycle.send = partial(_send_without_chunks, self.cycle, self.cycle.send)
        # Trailers may follow the body. uvicorn would add them to the request's headers, where a
        # proxy that removes headers has not looked for them.
        self.headers = []
        self._unused_bytes = 0
        if self.probes_only or self.expect_100_continue:
            # A client that is answered before it was told to continue may send the body or not.
            self.cycle.keep_alive = False
        if self.pipeline:
            # uvicorn has paused reading, and would not notice that the client leaves.
            self.flow.resume_reading()
        else:
            self._answering = self.cycle
            self._go_on()

    def on_body(self, body: bytes) -> None:
        """A piece of the body has come; it is discarded if the request has been answered."""
        super().on_body(body)
        self._unused_bytes = 0
        if self._answering is self.cycle:
            self._deadline += len(body) / _SLOWEST_BODY

    def on_message_complete(self) -> None:
        """The request has come whole."""
        if not self.parser.should_upgrade():
            super().on_message_complete()
            self._unused_bytes = 0
            self.cycle.more_body = False
            if self.expect_100_continue and not self.probes_only:
                self.cycle.keep_alive = self.parser.should_keep_alive()
            if not self.pipeline:
                self._go_on()

    def on_response_complete(self) -> None:
        """A request has been answered; the next one's turn."""
        self._answering = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        if not self.transport.is_closing():
            self._go_on()

    def _reject(self, error: errors.ServiceError, reason: str) -> None:
        """End the connection for what has come last; a whole request is answered before that."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self._all.dropped.labels(reason).inc()
        if self._answering is not None and not self._answering.more_body:
            self.pipeline.clear()
            self.cycle = self._answering
            self.cycle.keep_alive = False
            return
        if not (self.cycle and self.cycle.more_body and self.cycle.response_started):
            self.transport.write(last_response(error, self.server_state.default_headers))
        self.transport.close()
