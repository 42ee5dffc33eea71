"""What refusals cost: turns of one benchmark compared with each other."""

import asyncio
from collections.abc import Sequence

import pytest

from app.bench.transport import HttpClient
from benchmarks import refusals
from benchmarks.refusals import QUIET, REFUSER, SERVICE, Turn, ratio, render


def turns(*tokens: float, refused: float = 0.0) -> Sequence[Turn]:
    """Turns with so many tokens a second each."""
    return [Turn(t, refused, {"API": 0.1, "engine": 1.8}) for t in tokens]


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
    assert rows[QUIET] == ["405", "", "0", "0.100", "1.800"]
    assert rows[SERVICE] == ["364", "0.900 ± 0.000", "150", "0.100", "1.800"]
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
