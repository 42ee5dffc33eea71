"""Server-sent events: framing, and answers as streams of them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Protocol

import anyio
import msgspec
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.types import Message, Receive, Scope, Send

from app.api.errors import error_content
from app.api.schemas import usage
from app.core.logging import get_logger
from app.services.answers import Answer
from app.utils.errors import InternalError, ServiceError

log = get_logger()

PING_SECONDS = 15

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
_ERROR = b'data: {"error":'

Delta = Callable[[str], dict[str, Any]]
"""Makes the ``delta`` member of an event from a piece of text."""


class Closing(Protocol):
    """What stops generating when it is closed."""

    async def aclose(self) -> None:
        """Stop."""


def frame(content: Any) -> bytes:
    """One event that carries ``content`` as JSON."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


# JSON has no line breaks inside, so an answer's text can be mistaken for neither of these.


def ends_stream(chunk: bytes) -> bool:
    """Whether these bytes of a stream are the last ones that tell anything."""
    return chunk.endswith(DONE)


def has_error_event(chunk: bytes) -> bool:
    """Whether a stream says with these bytes that it failed."""
    return chunk.startswith(_ERROR) or b"\n" + _ERROR in chunk


class _SendLimit:
    """Ends a stream when a message of it is not taken in time.

    An event and a ping may be on their way at once. Each has its own time, so that neither
    prolongs the other's: the one that has waited longest decides.

    Attributes:
        timeout: Spans the stream.
    """

    def __init__(self, seconds: float) -> None:
        """Begin without a limit, as nothing is on its way.

        Args:
            seconds: What a message may take.
        """
        self.timeout = asyncio.timeout(None)
        self._seconds = seconds
        self._pending: list[float] = []

    async def send(self, send: Send, message: Message) -> None:
        """Send a message of the stream."""
        started = asyncio.get_running_loop().time()
        self._pending.append(started)
        self._move()
        try:
            await send(message)
        finally:
            self._pending.remove(started)
            self._move()

    def _move(self) -> None:
        if not self.timeout.expired():
            self.timeout.reschedule(self._pending[0] + self._seconds if self._pending else None)


class EventStream(EventSourceResponse):  # type: ignore[misc]
    """An answer as a response of events; see docs/api.md, "Streams"."""

    def __init__(
        self, source: Closing, frames: AsyncIterator[bytes], *, send_timeout_seconds: float
    ) -> None:
        """Prepare the response.

        Args:
            source: What the events come from.
            frames: The events, without those that end every stream.
            send_timeout_seconds: A reader that does not take an event for this long is dropped,
                which frees its place in the engine.
        """
        self._source = source
        self._send_timeout_seconds = send_timeout_seconds
        super().__init__(
            _to_the_end(frames),
            ping=PING_SECONDS,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            sep="\n",
        )

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """Send; the time of ``send`` is limited where it comes from.

        The parent opens a cancel scope around each message, which costs a sixth of the way from
        engine to socket, and none around the last one; here one timeout spans the stream and is
        moved.
        """
        await send(message)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the reader is gone."""
        limit = _SendLimit(self._send_timeout_seconds)
        try:
            async with limit.timeout:
                await super().__call__(scope, receive, partial(limit.send, send))
        except TimeoutError:
            log.warning("a stream's reader stopped reading and was dropped")
        finally:
            # A reader may leave before the first event is asked for, and then the generator of
            # the events never starts, and so never ends the answer.
            with anyio.CancelScope(shield=True):
                await self._source.aclose()


async def _to_the_end(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The events, and what ends them.

    A fault on the way becomes an event of its own, since the status line is long gone.
    """
    try:
        async for event in frames:
            yield event
    except ServiceError as error:
        yield frame(error_content(error))
    except Exception:
        log.exception("a stream broke off")
        yield frame(error_content(InternalError()))
    yield DONE


def native_stream(answer: Answer, delta: Delta, *, send_timeout_seconds: float) -> EventStream:
    """An answer of a native route as a response of events; see :class:`EventStream`."""
    frames = _native_frames(answer, delta)
    return EventStream(answer, frames, send_timeout_seconds=send_timeout_seconds)


async def _native_frames(answer: Answer, delta: Delta) -> AsyncIterator[bytes]:
    yield frame({"id": answer.id, "model": answer.model, "delta": {"role": "assistant"}})
    async for piece in answer:
        yield frame({"id": answer.id, "delta": delta(piece)})
    completion = answer.completion
    yield frame(
        {
            "id": completion.id,
            "model": completion.model,
            "delta": {},
            "finish_reason": completion.finish_reason,
            "tokens_generated": completion.completion_tokens,
            "cached": completion.cached,
            "usage": usage(completion).model_dump(exclude_none=True),
        }
    )
