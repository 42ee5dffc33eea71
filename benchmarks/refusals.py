"""``python -m benchmarks refusals``: what an overload's refusals take from the answers.

``overload`` compares minutes with each other, between which a machine's speed may drift by more
than refusals cost. Here the engine is full throughout, and for a few seconds at a time more
requests arrive than it has places for: to the service, or to a server that does nothing but refuse,
so that what is left of the cost is that they are sent and received at all.
"""

import argparse
import asyncio
import math
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import cast
from urllib.parse import urlsplit

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
# What a body without a length ends with, and the end of the chunk before.
_LAST_CHUNK = b"\r\n0\r\n\r\n"
# Processes whose processor time is told.
_SHOWN = ("API", "client", "engine")


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
        self.own = time.process_time()
        self.tokens = totals["tokens_generated_total"]
        self.refused = totals["http_requests_total"]
        self.used = used


class _Line(asyncio.Protocol):
    """A connection that carries one further request at a time, and only looks for its answer's end.

    Whoever overloads a service elsewhere takes nothing of its cores, and so this takes as little as
    it can.
    """

    def __init__(self, arrivals: "_Arrivals", free: "list[_Line]") -> None:
        self._arrivals = arrivals
        self._free = free
        # Bytes that are still to come of the answer; ``None`` before its head has come.
        self._left: float | None = None
        self._end = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, message: bytes) -> None:
        """Send a request."""
        self._transport.write(message)

    def data_received(self, data: bytes) -> None:
        if self._left is None:
            # Heads are short, and are sent as one.
            head, _, data = data.partition(b"\r\n\r\n")
            _, found, length = head.partition(b"content-length: ")
            self._left = int(length.partition(b"\r")[0]) if found else math.inf
            self._end = b"\r\n"
            self._arrivals.answered += head.startswith(b"HTTP/1.1 200")
            self._arrivals.refused += head.startswith(b"HTTP/1.1 503")
        self._left -= len(data)
        self._end = (self._end + data)[-len(_LAST_CHUNK) :]
        if self._left == 0 or (self._left == math.inf and self._end == _LAST_CHUNK):
            self._left = None
            self._free.append(self)

    def connection_lost(self, _error: Exception | None) -> None:
        if self in self._free:
            self._free.remove(self)

    def close(self) -> None:
        """Leave."""
        self._transport.abort()


class _Arrivals:
    """Further requests at random times, each on a connection that no other one needs.

    Attributes:
        answered: Of these, since the beginning.
        refused: Of these.
    """

    def __init__(self, target: Target, bodies: Iterator[bytes]) -> None:
        self._bodies = bodies
        fields = {"Host": "localhost", "Content-Type": "application/json", **target.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._head = f"POST {target.path} HTTP/1.1\r\n{lines}Content-Length: ".encode()
        self._draw = random.Random(0)  # noqa: S311 - arrivals, not secrets  # nosec B311
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Task[None]] = set()
        self._lines: dict[str, list[_Line]] = {}
        self._all: list[_Line] = []
        self.answered = self.refused = 0

    def go_on(self, rate: float, url: str) -> None:
        """Send so many in a second to a server from now on."""
        if self._timer is not None:
            self._timer.cancel()
        if rate:
            self._wait(self._loop.time(), rate, url)

    def _wait(self, since: float, rate: float, url: str) -> None:
        at = since + self._draw.expovariate(rate)
        self._timer = self._loop.call_at(at, self._arrive, at, rate, url)

    def _arrive(self, at: float, rate: float, url: str) -> None:
        self._wait(at, rate, url)
        body = next(self._bodies)
        message = b"%s%d\r\n\r\n%s" % (self._head, len(body), body)
        free = self._lines.setdefault(url, [])
        if free:
            free.pop().send(message)
        else:
            task = self._loop.create_task(self._open(url, free, message))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, url: str, free: list[_Line], message: bytes) -> None:
        parts = urlsplit(url)
        _, line = await self._loop.create_connection(
            lambda: _Line(self, free), str(parts.hostname), parts.port or 80
        )
        self._all.append(line)
        line.send(message)

    def close(self) -> None:
        """Send no more, and leave what is under way."""
        self.go_on(0.0, "")
        for line in self._all:
            line.close()


class _Load:
    """A service whose places are all taken, and whoever else asks it.

    Attributes:
        arrivals: Whoever else.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._service = HttpClient(target.base_url, time_limit=120)
        planned = _WORKLOAD.plan(_PLANNED, round_name="refusals")
        self._bodies = self._all_different([target.body(request) for request in planned])
        self.arrivals = _Arrivals(target, self._bodies)

    @staticmethod
    def _all_different(bodies: Sequence[bytes]) -> Iterator[bytes]:
        """Bodies that have not been sent before, so that none is taken for a kept answer."""
        for lap in count():
            yield from (body + b" " * lap for body in bodies)

    async def client(self) -> None:
        """Ask for answer after answer, until cancelled."""
        while True:
            exchange = await self._service.post(
                self._target.path, next(self._bodies), self._target.headers
            )
            if exchange.status != 200:
                await asyncio.sleep(_AGAIN_SECONDS)

    async def read(self, session: int) -> _Reading:
        """What the service has done."""
        exchange = await self._service.get("/metrics")
        return _Reading(b"".join(p for _, p in exchange.pieces).decode(), cores(session))

    def close(self) -> None:
        self._service.close()
        self.arrivals.close()


class Turn:
    """What one turn of some seconds brought.

    Attributes:
        tokens: Tokens a second.
        refusals: Refusals a second, whoever gave them.
        cores: Processors that each process used, this one as the client.
    """

    def __init__(self, tokens: float, refusals: float, cores: Mapping[str, float]) -> None:
        self.tokens = tokens
        self.refusals = refusals
        self.cores = cores


def _turn(before: _Reading, after: _Reading, refused_elsewhere: int = 0) -> Turn:
    seconds = after.at - before.at
    refusals = after.refused - before.refused + refused_elsewhere
    used = {x: (after.used[x] - before.used.get(x, 0.0)) / seconds for x in after.used}
    used["client"] = (after.own - before.own) / seconds
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
    load: _Load, session: int, urls: Mapping[str, str], *, factor: float, turns: int, seconds: float
) -> dict[str, list[Turn]]:
    await asyncio.sleep(_WARM_UP_SECONDS / 2)
    begin = await load.read(session)
    await asyncio.sleep(_WARM_UP_SECONDS / 2)
    quiet = _turn(begin, await load.read(session))
    found: dict[str, list[Turn]] = {kind: [] for kind in KINDS}
    order = [*KINDS]
    shuffle = random.Random(1).shuffle  # noqa: S311 - as above  # nosec B311
    for number in range(turns):
        shuffle(order)
        for kind in order:
            # The machine's speed drifts, and with it what so many times the capacity is.
            rate = factor * quiet.tokens / _MEAN_TOKENS
            load.arrivals.go_on(rate if kind in urls else 0.0, urls.get(kind, ""))
            await asyncio.sleep(_SETTLING_SECONDS)
            before, refused = await load.read(session), load.arrivals.refused
            await asyncio.sleep(seconds)
            after = await load.read(session)
            elsewhere = load.arrivals.refused - refused if kind == REFUSER else 0
            found[kind].append(_turn(before, after, elsewhere))
        quiet = found[QUIET][-1]
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
        used = [_mean(t.cores.get(label, 0.0) for t in turns) for label in _SHOWN]
        lines.append(
            [
                kind,
                f"{_mean(t.tokens for t in turns):.0f}",
                "" if kind == QUIET else f"{of_quiet:.3f} ± {error:.3f}",
                f"{_mean(t.refusals for t in turns):.0f}",
                *(f"{cores:.3f}" for cores in used),
            ]
        )
    turns_each = len(found[QUIET])
    header = [f"further requests, {turns_each} turns each", "tokens/s", "of those without"]
    return table([*header, "refusals/s", *(f"{x}, cores" for x in _SHOWN)], lines)


async def measure(options: argparse.Namespace) -> str:
    """Start both servers, take the turns, and tell the figures."""
    server = await start(limited(options.engine, options.device))
    try:
        async with _refuser() as url:
            load = _Load(server.target)
            working = [asyncio.create_task(load.client()) for _ in range(_CLIENTS)]
            try:
                found = await _rounds(
                    load,
                    server.process.pid,
                    {SERVICE: server.target.base_url, REFUSER: url},
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
