"""Calling the application without a server, one message at a time."""

import asyncio
from typing import Any


def http_scope(
    method: str,
    path: str,
    headers: dict[str, str] | None = None,
    *,
    client: tuple[str, int] = ("203.0.113.9", 5000),
) -> dict[str, Any]:
    """A request as a server hands it to an ASGI application."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
        "client": client,
        "server": ("testserver", 80),
    }


class Sent:
    """Collects the messages that an application sends.

    Attributes:
        messages: All of it, in order.
    """

    def __init__(self) -> None:
        self.messages: list[Any] = []

    async def __call__(self, message: Any) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        """The response's status."""
        status: int = self.messages[0]["status"]
        return status

    @property
    def headers(self) -> dict[str, str]:
        """The response's headers."""
        return {k.decode(): v.decode() for k, v in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        """The response's body."""
        return b"".join(m.get("body", b"") for m in self.messages[1:])


class Received:
    """Gives an application a body, and counts the messages that it takes.

    Attributes:
        taken: Messages taken.
    """

    def __init__(self, chunk: bytes, *, endless: bool = False) -> None:
        self._chunk = chunk
        self._endless = endless
        self.taken = 0

    async def __call__(self) -> Any:
        self.taken += 1
        return {"type": "http.request", "body": self._chunk, "more_body": self._endless}


class Leaving:
    """A client that sends a body, and leaves as soon as it has received its first piece of text.

    Its methods are the ``receive`` and the ``send`` of the application.
    """

    def __init__(self, body: bytes) -> None:
        self._messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]
        self._left = asyncio.Event()

    async def receive(self) -> Any:
        """The body, and later that the client has gone."""
        if self._messages:
            return self._messages.pop()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        """Take a message, and leave at the first that contains text."""
        if b'"text"' in message.get("body", b""):
            self._left.set()
