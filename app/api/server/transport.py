"""A transport that can stop sending before it stops listening."""

import asyncio
from collections.abc import Callable
from typing import Any


class GentleTransport(asyncio.Transport):
    """Wraps a connection's transport, and lets its owner decide how closing is done.

    A socket that is closed while the client still sends is reset, and the client loses the answer
    it has not read yet. So ``close()`` asks the owner, who calls :meth:`end` where more may come,
    and :meth:`shut` otherwise.

    Attributes:
        written: Bytes that have been handed over for sending.
        aborted: Whether what was left has been given up.
    """

    def __init__(self, transport: asyncio.Transport, on_close: Callable[[], None]) -> None:
        super().__init__()
        self._transport = transport
        self._on_close = on_close
        self._ended = False
        self._holding = False
        self._held = b""
        self.written = 0
        self.aborted = False

    def hold(self) -> None:
        """Keep what is written next until the write after that, or :meth:`let_go`."""
        self._holding = True

    def let_go(self) -> None:
        """Send what was kept."""
        self._holding = False
        if self._held:
            self.write(b"")

    def close(self) -> None:
        """Ask the owner to close the connection."""
        if not self.is_closing():
            self._on_close()

    def end(self) -> None:
        """Send what is left and then the end of the stream; what comes is still received."""
        self.let_go()
        self._ended = True
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()

    def shut(self) -> None:
        """Send what is left, and close the connection."""
        self.let_go()
        self._ended = True
        self._transport.close()

    def abort(self) -> None:
        """Close the connection without sending what is left."""
        self._ended = self.aborted = True
        self._transport.abort()

    def is_closing(self) -> bool:
        """Whether nothing more can be sent."""
        return self._ended or self._transport.is_closing()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send, unless the end has been sent already."""
        if self.is_closing():
            return
        if self._holding:
            self._held, self._holding = bytes(data), False
            return
        if self._held:
            data, self._held = self._held + data, b""
        self.written += len(data)
        self._transport.write(data)

    def get_write_buffer_size(self) -> int:
        """Bytes that the system has not taken yet."""
        return self._transport.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What is known of the socket."""
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        """Receive nothing for a while."""
        if not self.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Receive again."""
        if not self.is_closing():
            self._transport.resume_reading()
