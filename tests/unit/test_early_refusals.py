"""When a connection asks for a refusal, and when the application gets the request instead."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from app.api.early_refusals import EarlyRefusals, Refusal
from app.api.server.connections import Connections
from app.api.server.protocol import GuardedProtocol
from app.core.config_server import ServerSettings
from app.core.metrics import Metrics
from app.core.rate_limit import ClientAddress

HEAD = b"POST /ask HTTP/1.1\r\nHost: localhost\r\n"
LENGTH_3 = HEAD + b"Content-Length: 3\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
LONG = b"x" * 20_000
REFUSED = Refusal(503, [(b"content-length", b"2")], b"no")


class Refusals:
    """Refuses what it is told to, and notes what it is asked.

    Attributes:
        are_near: Whether to ask at all.
        asked: Bodies it was asked about.
    """

    def __init__(self) -> None:
        self.are_near = True
        self.asked: list[bytes] = []

    def find(self, _scope: Scope, body: bytes) -> Refusal | None:
        """Everything but ``yes``."""
        self.asked.append(body)
        return None if body == b"yes" else REFUSED


class Server:
    """A server whose application answers 200 with what it got."""

    def __init__(self, refusals: Refusals, port: int) -> None:
        self.refusals = refusals
        self._port = port

    async def say(self, *pieces: bytes) -> bytes:
        """What comes back on one connection to pieces that come one after the other."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.05)
        writer.write_eof()
        found = await reader.read()
        writer.close()
        return found


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A server on this event loop."""

    async def application(_scope: Scope, receive: Receive, send: Send) -> None:
        got, more = b"", True
        while more:
            message = await receive()
            got, more = got + message.get("body", b""), message.get("more_body", False)
        length = (b"content-length", b"%d" % (len(got) + 4))
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": b"got " + got})

    refusals = Refusals()
    async with serving(application, refusals) as port:
        yield Server(refusals, port)


@asynccontextmanager
async def serving(application: object, refusals: Refusals) -> AsyncIterator[int]:
    """A port on which connections have these refusals, in front of an application."""
    connections = Connections(ServerSettings(), ClientAddress([]), Metrics())
    config = Config(application, log_config=None, access_log=False)  # type: ignore[arg-type]
    config.load()
    state, early = ServerState(), cast("EarlyRefusals", refusals)
    listening = await asyncio.get_running_loop().create_server(
        lambda: GuardedProtocol(connections, early, config, state, {}), "127.0.0.1", 0
    )
    yield listening.sockets[0].getsockname()[1]
    listening.close()


def answers(sent: bytes) -> list[bytes]:
    """Status and body of each response that came back."""
    heads = sent.split(b"HTTP/1.1 ")[1:]
    return [head[:3] + b" " + head.partition(b"\r\n\r\n")[2] for head in heads]


@pytest.mark.parametrize("sent", [LENGTH_3 + b"abc", CHUNKED], ids=["length", "chunks"])
async def test_what_comes_at_once_is_refused_without_the_application(
    server: Server, sent: bytes
) -> None:
    """Its body is shown whole, and the connection stays for the next request."""
    assert answers(await server.say(sent, LENGTH_3 + b"yes")) == [b"503 no", b"200 got yes"]
    assert server.refusals.asked == [b"abc", b"yes"]


async def test_a_long_body_is_refused_as_a_short_one(server: Server) -> None:
    """The parser is given less at a time than comes."""
    found = await server.say(HEAD + b"Content-Length: 20000\r\n\r\n" + LONG)
    assert answers(found) == [b"503 no"]
    assert server.refusals.asked == [LONG]


async def test_what_comes_in_parts_is_the_applications(server: Server) -> None:
    """It may have something to say before the rest comes, such as that a key is wrong."""
    assert answers(await server.say(LENGTH_3, b"a", b"bc")) == [b"200 got abc"]
    assert answers(await server.say(LENGTH_3 + b"a", b"bc")) == [b"200 got abc"]
    assert not server.refusals.asked


async def test_who_waits_to_be_told_to_go_on_is_told(server: Server) -> None:
    """Only the application may say that it wants a body."""
    head = HEAD + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n"
    assert answers(await server.say(head, b"abc")) == [b"100 ", b"200 got abc"]
    assert answers(await server.say(head + b"abc"))[-1] == b"200 got abc"
    assert not server.refusals.asked


async def test_nothing_is_asked_while_refusals_are_far(server: Server) -> None:
    """Most of the time there is room."""
    server.refusals.are_near = False
    assert answers(await server.say(LENGTH_3 + b"abc")) == [b"200 got abc"]
    assert not server.refusals.asked


async def test_requests_behind_each_other_are_answered_in_their_order(server: Server) -> None:
    """What came behind one that is still being answered is the application's, too."""
    order = [b"abc", b"def", b"yes", b"ghi"]
    found = await server.say(b"".join(LENGTH_3 + body for body in order), LENGTH_3 + b"jkl")
    assert answers(found) == [b"503 no", b"503 no", b"200 got yes", b"200 got ghi", b"503 no"]
    assert server.refusals.asked == [b"abc", b"def", b"yes", b"jkl"]


@pytest.mark.parametrize(
    "head",
    [
        LENGTH_3.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        LENGTH_3.replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
    ids=["asked for", "HTTP/1.0"],
)
async def test_the_connection_ends_where_it_is_the_last_answer(server: Server, head: bytes) -> None:
    """It is said so, and what stands behind is not answered."""
    found = await server.say(head + b"abc" + LENGTH_3 + b"yes")
    assert answers(found) == [b"503 no"]
    assert b"connection: close\r\n" in found


async def test_a_broken_body_is_no_request(server: Server) -> None:
    """A chunk that is none is malformed, and not refused for want of a place."""
    found = await server.say(CHUNKED.replace(b"0\r\n\r\n", b"zz\r\n\r\n"))
    assert answers(found)[0].startswith(b"400 ")
    assert not server.refusals.asked
