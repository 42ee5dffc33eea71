"""One connection, with an end to everything that a client can hold open.

uvicorn has a limit for idle connections alone; docs/adr/0020-connections.md says what was measured
and why its protocol is extended rather than replaced.
"""

import asyncio
from enum import Enum
from functools import partial
from typing import Any

import httptools
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from app.api.server.connections import Connections
from app.api.server.messages import last_response
from app.api.server.strict import StrictProtocol
from app.api.server.transport import GentleTransport
from app.core.logging import get_logger
from app.utils.errors import (
    HeadersTooLargeError,
    MalformedHTTPError,
    RequestTimeoutError,
    ServiceError,
    TooManyConnectionsError,
)

log = get_logger()

PROBES = frozenset({b"/health", b"/livez", b"/readyz"})

# Bytes that may come without the parser making anything of them: heads, trailers, extensions.
_MAX_HEAD_BYTES = 65_536
# The parser is fed no more at a time, so that few pipelined requests are queued at once.
_PIECE_BYTES = 4096
# Bytes kept for later while a request is being answered; past that, reading pauses.
_MAX_AHEAD_BYTES = 65_536
# Rest of a refused request's body that is read for the sake of the requests behind it.
_MAX_DRAINED_BYTES = 65_536
# A body that comes at this rate, in bytes a second, has as long as it takes.
_SLOWEST_BODY = 16_384
# How long what a client still sends is thrown away after the last answer, so that it reads that.
_LINGER_SECONDS = 2.0


class _Phase(Enum):
    HEAD = "the head of a request is to come"
    BODY = "the body of a request is to come, which may have been refused already"
    ANSWER = "a request has come whole and is being answered"
    IDLE = "a request has been answered, and nothing of the next one has come"
    LINGER = "the last answer has been sent, and what still comes is thrown away"


class GuardedProtocol(StrictProtocol):
    """One connection of a client.

    Attributes:
        address: What the connection is counted by.
        probes_only: Whether it is one too many, and so is good for a probe alone.
    """

    def __init__(
        self,
        connections: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.address: str | None = None
        self.probes_only = False
        self._all = connections
        self._limits = connections.limits
        self._phase = _Phase.HEAD
        self._since = 0.0
        self._answering: RequestResponseCycle | None = None
        # What has come behind a request that is still being answered.
        self._ahead = bytearray()
        # Of the request that is coming in.
        self._announced: int | None = None
        self._body_bytes = 0
        self._drained_bytes = 0
        # Bytes since the parser last made something of them.
        self._unused_bytes = 0
        # Bytes that the system had taken when it last took some, and when that was.
        self._taken_bytes = 0
        self._taken_at = 0.0

    # --- The connection ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        self._gentle = GentleTransport(transport, self._close)
        super().connection_made(self._gentle)
        self.address = self.client[0] if self.client else None
        self._since = self._taken_at = self.loop.time()
        self._all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone; whoever works for it is told."""
        self._all.remove(self)
        self._gentle.shut()
        self._ahead.clear()
        # uvicorn tells the last request that came, which pipelining makes another one.
        self._disconnect(self._answering)
        super().connection_lost(exc)

    def make_room(self) -> None:
        """Close at once; nobody is being served."""
        self._all.remove(self)
        self._all.drops("limit" if self.probes_only else "evicted")
        self._gentle.abort()

    def abort(self) -> None:
        """Close at once, and forget what has not been sent."""
        self._gentle.abort()

    def _close(self) -> None:
        """Close; where the client may still be sending, only after it has had time to read."""
        half_sent = self._unused_bytes > 0 or self._phase is _Phase.BODY or self._ahead
        if half_sent and self._phase is not _Phase.LINGER:
            self._gentle.end()
            self._enter(_Phase.LINGER)
        else:
            self._gentle.shut()

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        self._since = self.loop.time()
        if phase in (_Phase.BODY, _Phase.ANSWER):
            self._all.serves(self)
        else:
            self._all.waits(self)

    # --- Time -------------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """Close what has taken longer than it may; ``now`` is the event loop's time."""
        if self._is_stuck(now):
            self._drop_reader()
        elif self._phase is _Phase.LINGER:
            if now - self._since >= _LINGER_SECONDS and not self._gentle.get_write_buffer_size():
                self._gentle.shut()
        elif not self.transport.is_closing():
            self._check_phase(now - self._since)

    def _drop_reader(self) -> None:
        if not self._gentle.aborted:
            log.warning("a client took nothing of its answer in time and was dropped")
            self._all.drops("send_timeout")
            self._gentle.abort()

    def _is_stuck(self, now: float) -> bool:
        """Whether the client has taken nothing for too long of what there is for it."""
        unsent = self._gentle.get_write_buffer_size()
        taken = self._gentle.written - unsent
        if not unsent or taken > self._taken_bytes:
            self._taken_bytes = taken
            self._taken_at = now
        return now - self._taken_at >= self._limits.send_timeout_seconds

    def _check_phase(self, seconds: float) -> None:
        if self._phase is _Phase.IDLE:
            if seconds >= self._limits.keep_alive_seconds:
                self.transport.close()
        elif self._phase is _Phase.BODY:
            earned = self._body_bytes / _SLOWEST_BODY
            if seconds >= self._limits.body_timeout_seconds + earned:
                self._reject(RequestTimeoutError(), "body_timeout")
        elif self._phase is _Phase.HEAD and seconds >= self._limits.header_timeout_seconds:
            self._reject(RequestTimeoutError(), "header_timeout")

    # --- What comes in ----------------------------------------------------------------------------

    @property
    def _is_busy(self) -> bool:
        """Whether a request that has come whole is still being answered."""
        cycle = self._answering
        is_open = cycle is not None and not cycle.response_complete
        return is_open and (cycle is not self.cycle or not self.cycle.more_body)

    def data_received(self, data: bytes) -> None:
        """Something has come; it is parsed when its turn is.

        What stands behind a request is kept as it came. Parsing it would make uvicorn stop
        reading, and then it would not be seen that the client has left.
        """
        if self.transport.is_closing():
            return
        if self._ahead or self._is_busy:
            self._ahead += data
            if len(self._ahead) > _MAX_AHEAD_BYTES:
                self.flow.pause_reading()
        else:
            self._feed(data)

    def _feed(self, data: bytes) -> None:
        self._take_pieces(data)
        if self.pipeline:
            self.flow.resume_reading()

    def _take_pieces(self, data: bytes) -> None:
        for start in range(0, len(data), _PIECE_BYTES):
            if self.transport.is_closing():
                return
            if self._is_busy:
                self._ahead += data[start:]
                break
            self._take(data[start : start + _PIECE_BYTES])

    def _feed_ahead(self) -> None:
        data, self._ahead = bytes(self._ahead), bytearray()
        if not self.transport.is_closing():
            self._feed(data)

    def _take(self, piece: bytes) -> None:
        if self._phase is _Phase.IDLE:
            self._enter(_Phase.HEAD)
        self._unused_bytes += len(piece)
        try:
            self.parse(piece)
        except httptools.HttpParserError:
            self._reject(MalformedHTTPError(), "malformed")
        else:
            if self._unused_bytes > _MAX_HEAD_BYTES:
                self._reject(HeadersTooLargeError(), "headers_too_large")

    # --- What the parser finds --------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._announced = None
        self._body_bytes = self._drained_bytes = 0

    def on_request(self) -> None:
        """The head has come; the request is started, or waits for those before it.

        Raises:
            ValueError: No further request is taken.
        """
        if self.transport.is_closing():
            raise ValueError("the connection has ended")
        if self.probes_only and self.url.partition(b"?")[0] not in PROBES:
            self._reject(TooManyConnectionsError(), "limit")
            raise ValueError("the connection is for probes")
        for name, value in self.headers:
            if name == b"content-length" and value.isdigit():
                self._announced = int(value)
        super().on_request()
        self._unused_bytes = 0

    def on_body(self, body: bytes) -> None:
        """A piece of the body; thrown away where the request has been answered."""
        self._unused_bytes = 0
        self._body_bytes += len(body)
        super().on_body(body)
        if self.cycle.response_complete:
            self._drained_bytes += len(body)
            if self._drained_bytes > _MAX_DRAINED_BYTES:
                self.transport.close()

    def on_request_complete(self) -> None:
        """The request has come whole."""
        self._unused_bytes = 0
        super().on_request_complete()
        self.cycle.more_body = False
        if self.cycle is self._answering and self._phase is _Phase.BODY:
            self._enter(_Phase.IDLE if self.cycle.response_complete else _Phase.ANSWER)

    # --- What goes out ----------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        self._answering = cycle
        self._enter(_Phase.BODY if cycle.more_body else _Phase.ANSWER)
        answer: Any = partial(self._answer, cycle, app)
        super()._start_asgi_task(cycle, answer)

    async def _answer(
        self, cycle: RequestResponseCycle, app: ASGIApp, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Let the application answer; decide when it begins whether the connection stays."""

        async def deciding(message: Message) -> None:
            if message["type"] != "http.response.start":
                await send(message)
                self._gentle.let_go()
                return
            if not self._stays(cycle):
                cycle.keep_alive = False
            if any(name == b"content-length" for name, _ in message["headers"]):
                # The body follows at once; one packet costs both sides half of two.
                self._gentle.hold()
            await send(message)

        await app(scope, receive, deciding)

    def _stays(self, cycle: RequestResponseCycle) -> bool:
        """Whether another request can follow: at once, or after a rest of a body not too long."""
        if self.probes_only:
            return False
        if not cycle.more_body:
            return True
        if cycle.waiting_for_100_continue:
            # Nobody can know whether a body or another request comes next.
            return False
        return (self._announced or 0) - self._body_bytes <= _MAX_DRAINED_BYTES

    def on_response_complete(self) -> None:
        """A request has been answered; the next one's turn."""
        super().on_response_complete()
        # Its timer would fire before what has come is read, when the process was held up.
        self._unset_keepalive_if_required()
        cycle = self._answering
        if cycle is None or self.transport.is_closing():
            return
        if cycle.response_complete:
            if cycle.more_body:
                self._all.waits(self)
            else:
                self._enter(_Phase.IDLE)
        if self._ahead and not self._is_busy:
            self.loop.call_soon(self._feed_ahead)

    # --- Refusals of what is not a request --------------------------------------------------------

    def _reject(self, error: ServiceError, reason: str) -> None:
        """End the connection for what has come last, after answering what came before it."""
        if self.transport.is_closing():
            return
        self._all.drops(reason)
        if self._is_busy and self._answering is not None:
            last = self._answering
            for cycle, _ in reversed(self.pipeline):
                last = last if cycle.more_body else cycle
            if self.cycle is not last:
                self.pipeline.popleft()
                self.cycle = last
            last.keep_alive = False
            return
        cycle = self._answering
        if cycle is not None and cycle.response_started and cycle.more_body:
            # The answer has been given, or is being given: there is no place for another one.
            self.transport.close()
            return
        self._disconnect(cycle)
        if self._unused_bytes or self._phase is _Phase.BODY:
            common, seconds = self.server_state.default_headers, self.loop.time() - self._since
            self.transport.write(last_response(error, common, seconds))
        self.transport.close()

    def _disconnect(self, cycle: RequestResponseCycle | None) -> None:
        """Tell the application that nobody waits for its answer any longer."""
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
