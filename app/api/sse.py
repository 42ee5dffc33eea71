"""Server-sent events: framing, and answers as streams of them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import msgspec
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.types import Message, Receive, Scope, Send

from app.core.logging import get_logger
from app.utils.errors import InternalError, ServiceError

log = get_logger()

PING_SECONDS = 15

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
# How an event begins that tells a fault.
_ERRORS = (b'data: {"error":', b"event: response.failed\n")


def frame(content: Any) -> bytes:
    """One event that carries ``content`` as JSON."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


# JSON has no line breaks inside, so an answer's text can be mistaken for neither of these.


def ends_stream(chunk: bytes) -> bool:
    """Whether these bytes of a stream are the last ones that tell anything."""
    return chunk.endswith(DONE)


def has_error_event(chunk: bytes) -> bool:
    """Whether a stream says with these bytes that it failed."""
    return chunk.startswith(_ERRORS) or any(b"\n" + error in chunk for error in _ERRORS)


class EventStream(EventSourceResponse):  # type: ignore[misc]
    """An answer as a response of events; see docs/api.md, "Streams".

    Args:
        frames: The events, the last one included.
        close: Awaited when the stream ends, however it does.
    """

    def __init__(self, frames: AsyncIterator[bytes], close: Callable[[], Awaitable[None]]) -> None:
        self._close = close
        super().__init__(
            frames,
            ping=PING_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            sep="\n",
        )

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """Send; the connection has the timeout. The parent's scope costs 5 % of an event's way."""
        await send(message)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client has left."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            # A client may leave before the first event is requested. Then the generator of the
            # events never starts, and its own cleanup never runs.
            with anyio.CancelScope(shield=True):
                await self._close()


def told_error(error: Exception) -> ServiceError:
    """What the reader of a stream is told of a fault; one that is not expected is logged."""
    if isinstance(error, ServiceError):
        return error
    log.error("a stream broke off", exc_info=error)
    return InternalError()
