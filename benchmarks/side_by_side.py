"""``python -m benchmarks table``: measures all servers, alternating in each round."""

import argparse
import asyncio
import statistics
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import machine, scenarios
from benchmarks.goals import CLIENTS, GPU_CLIENTS
from benchmarks.servers import Row, Server, StartError, all_rows, start


@dataclass
class Running:
    """The servers and engines that were started.

    Attributes:
        servers: The running servers.
        engines: Engines without HTTP, by name in the tables.
        absent: The reason of each failed start, by name in the tables.
        starts: The servers of all starts, by row.
    """

    servers: list[Server] = field(default_factory=list)
    engines: dict[str, scenarios.EngineAlone] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    starts: dict[str, list[Server]] = field(default_factory=dict)

    def stop(self) -> None:
        """Stop everything."""
        for server in self.servers:
            server.stop()
        for engine in self.engines.values():
            engine.stop()


def say(text: str) -> None:
    """Print progress."""
    print(text, flush=True)


async def start_all(
    rows: Sequence[Row], running: Running, *, engines: bool, times: int = 1
) -> None:
    """Start the rows one after another, because concurrent starts would slow each other down.

    Each row is started ``times`` times, alternating, and keeps running after the last start. The
    first start reads files from the disk that the next ones find in memory, so one start is no
    fair figure.
    """
    for number in range(times):
        for row in [row for row in rows if row.name not in running.absent]:
            try:
                server = await start(row)
            except StartError as error:
                running.absent[row.name] = str(error)
                say(f"{row.name}: not started, {error}")
                continue
            running.starts.setdefault(row.name, []).append(server)
            say(f"{row.name}: first answer after {server.first_answer_seconds:.1f} s")
            if number == times - 1:
                running.servers.append(server)
            else:
                server.stop()
    for row in [server.row for server in running.servers if server.row.is_ours and engines]:
        name = f"{row.name.removeprefix('ours, ')} without HTTP"
        try:
            running.engines[name] = scenarios.EngineAlone(row)
        except StartError as error:
            running.absent[name] = str(error)


async def rounds(running: Running, count: int, clients: Sequence[int]) -> dict[str, Any]:
    """Measure every server with every number of clients ``count`` times."""
    names = [*(server.row.name for server in running.servers), *running.engines]
    found: dict[str, Any] = {name: {str(c): [] for c in clients} for name in names}
    for server in running.servers:
        await scenarios.throughput(server, min(8, max(clients)), "warm-up")
    for engine in running.engines.values():
        engine.round(min(8, max(clients)), "warm-up")
    for number in range(count):
        for at_once in clients:
            name = f"round {number}, {at_once} clients"
            # Each round begins with another server, so that the order does not favour one.
            first = number % max(1, len(running.servers))
            for server in [*running.servers[first:], *running.servers[:first]]:
                figures = await scenarios.throughput(server, at_once, name)
                found[server.row.name][str(at_once)].append(figures)
                say(f"{name}: {server.row.name}: {figures['tokens_per_second']:.1f} tokens/s")
            for line, engine in list(running.engines.items()):
                try:
                    figures = engine.round(at_once, name)
                except StartError as error:
                    running.absent[line] = str(error)
                    running.engines.pop(line).stop()
                    continue
                found[line][str(at_once)].append(figures)
                say(f"{name}: {line}: {figures['tokens_per_second']:.1f} tokens/s")
    return found


async def details(running: Running, *, quick: bool) -> dict[str, Any]:
    """The measurements that are made once for each server."""
    found: dict[str, Any] = {"follow_up": {}, "cache_hit": {}, "gap": {}, "memory": {}}
    found["faults"] = []

    async def keep(kind: str, name: str, figures: Awaitable[dict[str, Any]]) -> None:
        say(f"{name}: {kind}")
        try:
            found[kind][name] = await figures
        except (RuntimeError, ValueError) as error:
            # A fault of one server is reported and does not end the comparison.
            found["faults"].append(f"{name}, {kind}: {error}")

    words = 500 if quick else scenarios.LONG_PROMPT_WORDS
    for server in running.servers:
        name = server.row.name
        found["memory"][name] = server.memory()
        await keep("gap", name, scenarios.long_prompt_gap(server, streams=4, words=words))
        if server.row.is_ours:
            await keep("follow_up", name, scenarios.follow_up(server, 2 if quick else 5))
            await keep("cache_hit", name, scenarios.cache_hit(server, 20 if quick else 300))
    return found


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the comparison; the JSON from which the page is made."""
    rows = all_rows(options.device, options.engine)
    if options.only:
        rows = [row for row in rows if any(word in row.name for word in options.only)]
    clients = (1, 8) if options.quick else GPU_CLIENTS if options.device == "cuda" else CLIENTS
    count = 1 if options.quick else options.rounds
    running = Running()
    try:
        await start_all(rows, running, engines=not options.quick, times=count)
        throughput = await rounds(running, count, clients)
        data = await details(running, quick=options.quick)
    finally:
        running.stop()
    started = {
        name: {
            "ready": _median(s.ready_seconds for s in running.starts[name]),
            "first_answer": _median(s.first_answer_seconds for s in running.starts[name]),
        }
        for name in (server.row.name for server in running.servers)
    }
    return {
        "machine": await asyncio.to_thread(machine.describe, options.device),
        "rows": [row.name for row in rows],
        "rounds": count,
        "absent": running.absent,
        "throughput": throughput,
        "start": started,
        **data,
    }
