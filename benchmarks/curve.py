"""``python -m benchmarks curve``: an engine by load and prompt length, and under overload."""

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

from benchmarks import machine
from benchmarks.load.report import number, seconds, table
from benchmarks.load.results import summarise
from benchmarks.load.rounds import run_round
from benchmarks.load.workload import Lengths, Workload
from benchmarks.overload import PEAK_REQUESTS, limited, overload, steady_rate, window
from benchmarks.overload import render as render_overload
from benchmarks.servers import Server, StartError, ours, start

CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROMPT_WORDS = (16, 64, 256, 1_000, 4_000, 7_800)
# Multiple of the load that saturates the service.
OVERLOAD = 4.0
OVERLOAD_SECONDS = 20.0
OVERLOAD_ROUNDS = 5


async def by_clients(server: Server, clients: Sequence[int]) -> list[dict[str, Any]]:
    """Closed loops of increasing numbers of clients."""
    found = []
    for at_once in clients:
        count = max(16, 2 * at_once)
        results = await run_round(
            server.target, Workload(), name=f"C {at_once}", requests=count, clients=at_once
        )
        figures = summarise(results)
        steady = steady_rate(results, *window(results, last_sent=False))
        found.append({"clients": at_once, "steady": steady, **figures})
        print(f"C = {at_once}: {figures['tokens_per_second']:.1f} tokens/s", flush=True)
    return found


async def by_length(server: Server, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """One client with prompts of increasing length."""
    found = []
    for words in lengths:
        workload = Workload(prompt_words=Lengths((words,)), output_tokens=Lengths((16,)))
        results = await run_round(
            server.target, workload, name=f"{words} words", requests=3, clients=1
        )
        found.append({"words": words, **summarise(results)})
        print(f"{words} words: TTFT {found[-1]['ttft']['p50']}", flush=True)
    return found


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of each engine, as the JSON from which the page is made."""
    engines = options.engine or ["transformers" if options.device == "cuda" else "openvino"]
    data: dict[str, Any] = {"engines": {}, "absent": {}}
    for engine in engines:
        try:
            data["engines"][engine] = await _measure_engine(engine, options)
        except StartError as error:
            data["absent"][engine] = str(error)
            print(f"{engine}: not started, {error}", flush=True)
    data["machine"] = await asyncio.to_thread(machine.describe, options.device)
    return data


async def _measure_engine(engine: str, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    server = await start(ours(engine, options.device))
    try:
        found["clients"] = await by_clients(server, (1, 4) if options.quick else CLIENTS)
        found["lengths"] = await by_length(server, (16, 256) if options.quick else PROMPT_WORDS)
    finally:
        server.stop()
    server = await start(limited(engine, options.device))
    try:
        found["overload"] = await overload(
            server.target,
            server.process.pid,
            factor=OVERLOAD,
            duration=5.0 if options.quick else OVERLOAD_SECONDS,
            rounds=1 if options.quick else OVERLOAD_ROUNDS,
            peak_requests=96 if options.quick else PEAK_REQUESTS,
        )
    finally:
        server.stop()
    return found


def render(data: dict[str, Any]) -> dict[str, str]:
    """The sections that ``python -m benchmarks curve`` writes."""
    parts = [f"{name}: not started, {reason}" for name, reason in data["absent"].items()]
    for engine, found in data["engines"].items():
        parts += [
            f"### {engine}",
            _clients(found),
            _lengths(found),
            render_overload(found["overload"]),
        ]
    return {"curve": "\n\n".join([machine.lines(data["machine"], "commit", "command"), *parts])}


def _clients(found: dict[str, Any]) -> str:
    header = ["clients", "tokens/s", "steady tokens/s", "TTFT p50", "TTFT p99", "gap p50", "failed"]
    lines = [
        [
            str(f["clients"]),
            number(f["tokens_per_second"]),
            number(f["steady"]),
            *(seconds(f["ttft"][p]) for p in ("p50", "p99")),
            seconds(f["gap"]["p50"]),
            str(f["failed"] + f["refused"]),
        ]
        for f in found["clients"]
    ]
    return table(header, lines)


def _lengths(found: dict[str, Any]) -> str:
    header = ["prompt tokens", "TTFT p50", "prompt tokens/s", "time per token after the first"]
    lines = []
    for f in found["lengths"]:
        tokens, first = f["prompt_tokens"], f["ttft"]["p50"]
        speed = tokens / first if tokens and first else None
        rest = seconds(f["time_per_token"]["p50"])
        lines.append([number(tokens), seconds(first), number(speed), rest])
    return table(header, lines)
