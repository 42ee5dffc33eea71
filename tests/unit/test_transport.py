"""A connection's transport: when what is written goes out, and what closing does with it."""

import asyncio

import pytest

from app.api.server.transport import GentleTransport


class Wire(asyncio.Transport):
    """The transport below, which keeps what is written to it.

    Attributes:
        writes: What the system was handed, write by write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self._closing = False
        self.transport = GentleTransport(self, on_close=lambda: None)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Keep it."""
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        """Whether it was closed."""
        return self._closing

    def can_write_eof(self) -> bool:
        """The end can be told."""
        return True

    def write_eof(self) -> None:
        """The end."""

    def resume_reading(self) -> None:
        """There is nothing to read."""

    def close(self) -> None:
        """The end of both ways."""
        self._closing = True

    def abort(self) -> None:
        """The end at once."""
        self._closing = True


def test_what_is_held_goes_out_with_the_next_write() -> None:
    """A head and its body make one write; what comes later goes out by itself."""
    wire = Wire()
    wire.transport.hold()
    wire.transport.write(b"head ")
    assert wire.writes == []
    assert wire.transport.written == 0
    for data in (b"body", b"more"):
        wire.transport.write(data)
    assert wire.writes == [b"head body", b"more"]
    assert wire.transport.written == len(b"head bodymore")


@pytest.mark.parametrize("ending", ["let_go", "end", "shut"])
def test_nothing_that_is_held_is_lost(ending: str) -> None:
    """A head without a body, as of HEAD, goes out by itself, also before the connection closes."""
    wire = Wire()
    wire.transport.hold()
    wire.transport.write(b"head")
    getattr(wire.transport, ending)()
    assert wire.writes == [b"head"]


def test_an_aborted_connection_sends_nothing_more() -> None:
    """What is held is forgotten with everything else."""
    wire = Wire()
    wire.transport.hold()
    wire.transport.write(b"head")
    wire.transport.abort()
    wire.transport.let_go()
    assert wire.writes == []


def test_letting_go_of_nothing_writes_nothing() -> None:
    """An unused hold ends."""
    wire = Wire()
    wire.transport.hold()
    wire.transport.let_go()
    wire.transport.write(b"piece")
    assert wire.writes == [b"piece"]
