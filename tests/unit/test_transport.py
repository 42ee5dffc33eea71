"""A connection's transport: when what is written goes out, and what closing does with it."""

import asyncio
from unittest.mock import Mock

import pytest

from app.api.server.transport import GentleTransport


class Wire:
    """A transport, and the writes that reach the one below it."""

    def __init__(self) -> None:
        self.below = Mock(spec=asyncio.Transport)
        self.below.is_closing.return_value = False
        self.transport = GentleTransport(self.below, on_close=Mock())

    @property
    def writes(self) -> list[bytes]:
        """What was handed to the system, write by write."""
        return [call.args[0] for call in self.below.write.call_args_list]


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
