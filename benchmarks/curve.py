"""``python -m benchmarks curve``: where one engine saturates, and what happens past that."""

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from app.bench.load import run_round
from app.bench.report import number, seconds, table
from app.bench.results import Outcome, Result, percentile, summarise
from app.bench.workload import Lengths, Workload
from benchmarks import machine
from benchmarks.servers import Server, StartError, ours, start

CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROMPT_WORDS = (16, 64, 256, 1_000, 4_000, 7_800)
OVERLOAD = 4.0
OVERLOAD_SECONDS = 30.0
# Waiting requests that the overloaded service accepts: enough to keep the batch full.
OVERLOAD_WAITING = "32"
# More than the 32 that run at once, and fewer than running and waiting together: none is refused.
PEAK_CLIENTS = 48
# What comes first fills the batch and what comes last drains it; neither is the steady state.
_SETTLING = 0.25


def steady_rate(results: Sequence[Result], begin: float, end: float) -> float:
    """Tokens a second between two times, from when each piece of text came.

    A stream's pieces share its tokens evenly, where a piece holds more than one.
    """
    tokens = 0.0
    for result in results:
        if result.outcome is not Outcome.COMPLETED or result.ttft is None:
            continue
        at = result.sent_at + result.ttft
        inside = int(begin <= at < end)
        for gap in result.gaps:
            at += gap
            inside += begin <= at < end
        tokens += inside * result.tokens / (len(result.gaps) + 1)
    return tokens / (end - begin)


def _window(results: Sequence[Result], *, last_sent: bool) -> tuple[float, float]:
    """The middle of a round: past its beginning, and before its load lets up."""
    begin = min(r.sent_at for r in results)
    end = max(r.sent_at if last_sent else r.ended_at for r in results)
    margin = (end - begin) * _SETTLING
    return begin + margin, end if last_sent else end - margin


async def by_clients(server: Server, clients: Sequence[int]) -> list[dict[str, Any]]:
    """A closed loop of more and more clients."""
    found = []
    for at_once in clients:
        count = max(16, 2 * at_once)
        results = await run_round(
            server.target, Workload(), name=f"C {at_once}", requests=count, clients=at_once
        )
        figures = msgspec.to_builtins(summarise(results))
        steady = steady_rate(results, *_window(results, last_sent=False))
        found.append({"clients": at_once, "steady": steady, **figures})
        print(f"C = {at_once}: {figures['tokens_per_second']:.1f} tokens/s", flush=True)
    return found


async def by_length(server: Server, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """One client with longer and longer prompts."""
    found = []
    for words in lengths:
        workload = Workload(prompt_words=Lengths((words,)), output_tokens=Lengths((16,)))
        results = await run_round(
            server.target, workload, name=f"{words} words", requests=3, clients=1
        )
        found.append({"words": words, **msgspec.to_builtins(summarise(results))})
        print(f"{words} words: TTFT {found[-1]['ttft']['p50']}", flush=True)
    return found


async def overload(server: Server, duration: float) -> dict[str, Any]:
    """An open loop of four times what a closed loop that fills the batch gets through."""
    full = await run_round(
        server.target,
        Workload(),
        name="peak",
        requests=96 if duration < 10 else 288,
        clients=PEAK_CLIENTS,
    )
    peak = steady_rate(full, *_window(full, last_sent=False))
    done = [r for r in full if r.outcome is Outcome.COMPLETED]
    tokens = sum(r.tokens for r in done) / max(1, len(done))
    rate = OVERLOAD * peak / max(1.0, tokens)
    results = await run_round(
        server.target,
        Workload(),
        name="overload",
        requests=max(1, int(rate * duration)),
        rate=rate,
    )
    steady = steady_rate(results, *_window(results, last_sent=True))
    waits = [r.seconds for r in results if r.outcome is Outcome.REFUSED]
    return {
        "peak": peak,
        "rate": rate,
        "steady": steady,
        "ratio": steady / peak if peak else None,
        "refusal_p99": percentile(waits, 99),
        **msgspec.to_builtins(summarise(results)),
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, for each engine, as the JSON that the page is made from."""
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
    # Refusals need a queue that fills.
    limited = ours(engine, options.device, ENGINE__MAX_WAITING=OVERLOAD_WAITING)
    server = await start(limited)
    try:
        found["overload"] = await overload(server, 5.0 if options.quick else OVERLOAD_SECONDS)
    finally:
        server.stop()
    return found


def render(data: dict[str, Any]) -> dict[str, str]:
    """The sections that ``python -m benchmarks curve`` writes."""
    parts = [f"{name}: not started, {reason}" for name, reason in data["absent"].items()]
    for engine, found in data["engines"].items():
        parts += [f"### {engine}", _clients(found), _lengths(found), _overload(found)]
    machine_lines = [f"- {name}: {value}" for name, value in data["machine"].items() if value]
    return {"curve": "\n\n".join(["\n".join(machine_lines), *parts])}


def _clients(found: dict[str, Any]) -> str:
    header = ["clients", "tokens/s", "in its middle", "TTFT p50", "TTFT p99", "gap p50", "failed"]
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


def _overload(found: dict[str, Any]) -> str:
    f = found["overload"]
    kept = "-" if f["ratio"] is None else f"{f['ratio']:.2f}"
    met = f["ratio"] is not None and f["ratio"] >= 0.95
    quick = f["refusal_p99"] is not None and f["refusal_p99"] <= 0.05
    lines = [
        ["offered, requests/s", number(f["rate"]), ""],
        ["completed / refused / failed", f"{f['completed']} / {f['refused']} / {f['failed']}", ""],
        ["tokens/s at the peak", number(f["peak"]), ""],
        ["tokens/s under the overload", number(f["steady"]), ""],
        ["overload ÷ peak", kept, f"≥ 0.95: {'met' if met else 'missed'}"],
        ["refusal p99", seconds(f["refusal_p99"]), f"≤ 50 ms: {'met' if quick else 'missed'}"],
    ]
    return table(["four times the saturating load", "", ""], lines)
