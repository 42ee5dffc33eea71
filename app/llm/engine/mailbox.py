"""What the engine has brought one request, until somebody takes it."""

import asyncio

from app.llm.engine.base import TokenEvent
from app.utils.errors import ServiceError


class Mailbox:
    """Events of one request between the socket's reader and whoever generates.

    Events that come while nobody looks are handed over together.
    """

    def __init__(self) -> None:
        """Nothing has come."""
        self._events: list[TokenEvent] = []
        self._error: ServiceError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent) -> None:
        """Deliver an event."""
        self._events.append(event)
        self._wake()

    def fail(self, error: ServiceError) -> None:
        """Nothing more will come; the first error stays."""
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[TokenEvent]:
        """All events since the last call; waits for the first.

        Raises:
            ServiceError: The request failed, and every event before that has been taken.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events, self._events = self._events, []
        return events
