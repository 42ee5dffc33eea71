"""``python -m benchmarks refusals``: what an overload's refusals take from the answers.

``overload`` compares minutes with each other, between which a machine's speed may drift by more
than refusals cost. Here the engine is full throughout, and for a few seconds at a time more
requests arrive than it has places for: to the service, or to a server that does nothing but refuse,
so that what is left of the cost is that they are sent and received at all.
"""

import argparse
import asyncio
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count

from prometheus_client.parser import text_string_to_metric_families

from app.bench.report import table
from app.bench.targets import Target
from app.bench.transport import HttpClient
from app.bench.workload import Lengths, Workload
from benchmarks.overload import limited
from benchmarks.servers import free_port, label_of, session_members, spawn, start
from benchmarks.servers import refuser as refuser_row

QUIET, SERVICE, REFUSER = "no more requests", "to the service", "to a server that only refuses"
KINDS = (QUIET, SERVICE, REFUSER)
# They take every place that one caller may have: 32 run and 28 wait, an eighth is for others.
_CLIENTS = 60
# A client that was refused comes back later than this, or its tries would be a load of their own.
_AGAIN_SECONDS = 1.0
# What a turn begins with is still the turn before.
_SETTLING_SECONDS = 1.6
_WARM_UP_SECONDS = 12.0
# More than are sent, nearly always: a prompt that was answered before is in the prefix cache.
_PLANNED = 60_000
_TICKS = os.sysconf("SC_CLK_TCK")
_WORKLOAD = Workload(output_tokens=Lengths((16, 48), uniform=True))
_MEAN_TOKENS = 32


def cores(session: int) -> dict[str, float]:
    """Processor seconds that a session's processes have used, by what they are."""
    found: dict[str, float] = {}
    for process in session_members(session):
        label = label_of((process / "cmdline").read_bytes().split(b"\0"))
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        seconds = (int(fields[11]) + int(fields[12])) / _TICKS
        found[label] = found.get(label, 0.0) + seconds
    return found


class _Reading:
    """What a service has done until now."""

    def __init__(self, metrics: str, used: Mapping[str, float]) -> None:
        totals = {"tokens_generated_total": 0.0, "http_requests_total": 0.0}
        for family in text_string_to_metric_families(metrics):
            for sample in family.samples:
                if sample.name in totals and sample.labels.get("status", "503") == "503":
                    totals[sample.name] += sample.value
        self.at = time.perf_counter()
        self.tokens = totals["tokens_generated_total"]
        self.refused = totals["http_requests_total"]
        self.used = used


class _Load:
    """A service whose places are all taken, and whoever else asks it.

    Attributes:
        rate: Further requests in a second.
        to_refuser: Whether these go to the other server.
        refused: Refusals that the other server has given.
    """

    def __init__(self, target: Target, refuser_url: str) -> None:
        self._target = target
        self._service = HttpClient(target.base_url, time_limit=120)
        self._refuser = HttpClient(refuser_url, time_limit=120)
        planned = _WORKLOAD.plan(_PLANNED, round_name="refusals")
        self._bodies = [target.body(request) for request in planned]
        self._number = count()
        self.rate = 0.0
        self.to_refuser = False
        self.refused = 0

    def _body(self) -> bytes:
        """A body that has not been sent before, so that none is taken for a kept answer."""
        lap, at = divmod(next(self._number), len(self._bodies))
        return self._bodies[at] + b" " * lap

    async def client(self) -> None:
        """Ask for answer after answer, until cancelled."""
        while True:
            exchange = await self._service.post(
                self._target.path, self._body(), self._target.headers
            )
            if exchange.status != 200:
                await asyncio.sleep(_AGAIN_SECONDS)

    async def _fire(self) -> None:
        http = self._refuser if self.to_refuser else self._service
        exchange = await http.post(self._target.path, self._body(), self._target.headers)
        self.refused += http is self._refuser and exchange.status == 503

    async def arrivals(self) -> None:
        """Send further requests at random times, until cancelled."""
        draw = random.Random(0)  # noqa: S311 - arrivals, not secrets  # nosec B311
        at = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            while True:
                if not self.rate:
                    await asyncio.sleep(0.02)
                    at = time.perf_counter()
                    continue
                at += draw.expovariate(self.rate)
                if (early := at - time.perf_counter()) > 0:
                    await asyncio.sleep(early)
                group.create_task(self._fire())

    async def read(self, session: int) -> _Reading:
        """What the service has done."""
        exchange = await self._service.get("/metrics")
        return _Reading(b"".join(p for _, p in exchange.pieces).decode(), cores(session))

    def close(self) -> None:
        self._service.close()
        self._refuser.close()


class Turn:
    """What one turn of some seconds brought.

    Attributes:
        tokens: Tokens a second.
        refusals: Refusals a second, whoever gave them.
        cores: Processors that each process used.
    """

    def __init__(self, tokens: float, refusals: float, cores: Mapping[str, float]) -> None:
        self.tokens = tokens
        self.refusals = refusals
        self.cores = cores


def _turn(before: _Reading, after: _Reading, refused_elsewhere: int) -> Turn:
    seconds = after.at - before.at
    refusals = after.refused - before.refused + refused_elsewhere
    used = {x: (after.used[x] - before.used.get(x, 0.0)) / seconds for x in after.used}
    return Turn((after.tokens - before.tokens) / seconds, refusals / seconds, used)


@asynccontextmanager
async def _refuser() -> AsyncIterator[str]:
    """The server that only refuses; where it listens."""
    port = free_port()
    row = refuser_row()
    process = spawn(row, row.command(port))
    http = HttpClient(url := f"http://127.0.0.1:{port}", time_limit=10)
    try:
        async with asyncio.timeout(30):
            while (await http.get("/")).status != 503:  # noqa: ASYNC110 - polls another process
                await asyncio.sleep(0.05)
        yield url
    finally:
        http.close()
        process.kill()
        process.wait()


async def _rounds(
    load: _Load, session: int, *, factor: float, turns: int, seconds: float
) -> dict[str, list[Turn]]:
    await asyncio.sleep(_WARM_UP_SECONDS / 2)
    begin = await load.read(session)
    await asyncio.sleep(_WARM_UP_SECONDS / 2)
    capacity = _turn(begin, await load.read(session), 0).tokens / _MEAN_TOKENS
    found: dict[str, list[Turn]] = {kind: [] for kind in KINDS}
    order = [*KINDS]
    shuffle = random.Random(1).shuffle  # noqa: S311 - as above  # nosec B311
    for number in range(turns):
        shuffle(order)
        for kind in order:
            load.rate = 0.0 if kind == QUIET else factor * capacity
            load.to_refuser = kind == REFUSER
            await asyncio.sleep(_SETTLING_SECONDS)
            before, elsewhere = await load.read(session), load.refused
            await asyncio.sleep(seconds)
            after = await load.read(session)
            found[kind].append(_turn(before, after, load.refused - elsewhere))
        shown = ", ".join(f"{kind}: {found[kind][-1].tokens:.0f}" for kind in KINDS)
        print(f"{number + 1} of {turns}, tokens/s {shown}", flush=True)
    return found


def ratio(turns: Sequence[Turn], quiet: Sequence[Turn]) -> tuple[float, float]:
    """Tokens of some turns over those of the quiet ones beside them, and its standard error.

    The ratio is that of the sums; its error is that of the mean of the rounds' own ratios.
    """
    of_sums = sum(t.tokens for t in turns) / sum(t.tokens for t in quiet)
    ratios = [turn.tokens / beside.tokens for turn, beside in zip(turns, quiet, strict=True)]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("inf")
    return of_sums, error


def _mean(values: Iterable[float]) -> float:
    return statistics.mean(values)


def render(found: Mapping[str, Sequence[Turn]]) -> str:
    """The kinds of turns beside each other."""
    lines = []
    for kind, turns in found.items():
        of_quiet, error = ratio(turns, found[QUIET])
        used = {label: _mean(t.cores.get(label, 0.0) for t in turns) for label in ("API", "engine")}
        lines.append(
            [
                kind,
                f"{_mean(t.tokens for t in turns):.0f}",
                "" if kind == QUIET else f"{of_quiet:.3f} ± {error:.3f}",
                f"{_mean(t.refusals for t in turns):.0f}",
                f"{used['API']:.3f}",
                f"{used['engine']:.3f}",
            ]
        )
    turns_each = len(found[QUIET])
    header = [f"further requests, {turns_each} turns each", "tokens/s", "of those without"]
    return table([*header, "refusals/s", "API, cores", "engine, cores"], lines)


async def measure(options: argparse.Namespace) -> str:
    """Start both servers, take the turns, and tell the figures."""
    server = await start(limited(options.engine, options.device))
    try:
        async with _refuser() as url:
            load = _Load(server.target, url)
            working = [asyncio.create_task(load.client()) for _ in range(_CLIENTS)]
            working.append(asyncio.create_task(load.arrivals()))
            try:
                found = await _rounds(
                    load,
                    server.process.pid,
                    factor=options.factor,
                    turns=options.turns,
                    seconds=options.seconds,
                )
            finally:
                for task in working:
                    task.cancel()
                await asyncio.gather(*working, return_exceptions=True)
                load.close()
    finally:
        server.stop()
    return render(found)
