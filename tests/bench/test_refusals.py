"""What refusals cost: turns of one benchmark compared with each other."""

import asyncio
from collections.abc import Callable, Sequence
from itertools import count

import pytest

from app.bench.targets import Route, Target
from app.bench.transport import HttpClient
from benchmarks import refusals
from benchmarks.refusals import QUIET, REFUSER, SERVICE, Turn, ratio, render


def turns(*tokens: float, refused: float = 0.0) -> Sequence[Turn]:
    """Turns with so many tokens a second each."""
    return [Turn(t, refused, {"API": 0.1, "client": 0.02, "engine": 1.8}) for t in tokens]


def test_turns_are_compared_with_the_quiet_ones_beside_them() -> None:
    """A machine that gets slower from round to round changes neither the ratio nor its error."""
    of_quiet, error = ratio(turns(90, 45, 18), turns(100, 50, 20))
    assert of_quiet == pytest.approx(0.9)
    assert error == pytest.approx(0.0, abs=1e-12)


def test_the_error_is_that_of_the_mean_of_the_ratios() -> None:
    """Four ratios of 0.8 and 1.0 in turns: their standard deviation over the root of four."""
    of_quiet, error = ratio(turns(80, 100, 80, 100), turns(100, 100, 100, 100))
    assert of_quiet == pytest.approx(0.9)
    assert error == pytest.approx(0.1154700538 / 2)
    assert ratio(turns(80), turns(100))[1] == float("inf")


def test_the_kinds_of_turns_stand_beside_each_other() -> None:
    """Each with its tokens, its share of the quiet turns', its refusals and its processors."""
    text = render(
        {
            QUIET: turns(400, 410),
            SERVICE: turns(360, 369, refused=150),
            REFUSER: turns(380, 389, refused=160),
        }
    )
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()[2:]
        if (cells := [cell.strip() for cell in line.strip("|").split("|")])
    }
    assert rows[QUIET] == ["405", "", "0", "0.100", "0.020", "1.800"]
    assert rows[SERVICE] == ["364", "0.900 ± 0.000", "150", "0.100", "0.020", "1.800"]
    assert rows[REFUSER][:3] == ["384", "0.949 ± 0.001", "160"]


async def test_the_server_that_only_refuses_does() -> None:
    """It answers whatever is sent with 503, on a connection that stays, while it is used."""
    async with refusals._refuser() as url:
        http = HttpClient(url, time_limit=10)
        for _ in range(2):
            exchange = await http.post("/v1/chat", b"x" * 100_000, {})
            assert (exchange.status, exchange.failure, exchange.resent) == (503, None, False)
        http.close()
    http = HttpClient(url, time_limit=1)
    assert (await asyncio.wait_for(http.get("/"), 5)).status is None
    http.close()


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - what holds is no event
            await asyncio.sleep(0.01)


async def test_further_requests_come_until_they_are_told_to_stop() -> None:
    """Each is refused on a connection that is used again, and counted when its answer has come."""
    async with refusals._refuser() as url:
        bodies = (b"%d" % number for number in count())
        arrivals = refusals._Arrivals(Target(url, Route.CHAT, "key"), bodies)
        arrivals.go_on(200.0, url)
        await until(lambda: arrivals.refused >= 40)
        arrivals.go_on(0.0, "")
        sent = int(next(bodies))
        await until(lambda: arrivals.refused == sent)
        arrivals.close()
    assert arrivals.answered == 0
    assert len(arrivals._all) < sent / 2


async def test_a_streams_connection_is_free_when_it_has_ended() -> None:
    """Not before: two requests at a time on one connection would wait for each other."""
    asked: list[bytes] = []
    ending, ended = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
        await ending.wait()
        writer.write(b"0\r\n\r\n")
        await ended.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    arrivals = refusals._Arrivals(Target(url, Route.CHAT, "key"), iter([b"one", b"two"]))
    free: list[refusals._Line] = []
    await arrivals._open(url, free, b"POST / HTTP/1.1\r\n\r\n")
    await until(lambda: arrivals.answered == 1)
    assert not free
    ending.set()
    await until(lambda: len(free) == 1)
    arrivals.close()
    ended.set()
    await until(lambda: not free)
    server.close()
    assert len(asked) == 1
