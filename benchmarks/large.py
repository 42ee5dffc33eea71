"""``python -m benchmarks large``: a model of 2.6 billion parameters, one server after the other."""

import argparse
import asyncio
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks import machine, peers
from benchmarks.goals import Ratio, divide
from benchmarks.load.report import number, seconds, table
from benchmarks.load.results import summarise
from benchmarks.load.rounds import run_round
from benchmarks.load.targets import Route
from benchmarks.load.workload import Lengths, Workload
from benchmarks.paths import ROOT, STAND_IN
from benchmarks.servers import Row, Server, StartError, ours, start
from benchmarks.side_by_side import say

CLIENTS = (1, 4, 8)
OUTPUT_TOKENS = 24
LONG_PROMPT_WORDS = 800

DEFAULT, INT4 = "ours, by default", "ours, int4"
LLAMA_8, LLAMA_4 = "llama-server, Q8_0", "llama-server, Q4_0"
# Least ratios to the tokens/s of the peer with the same bits, by clients.
_GOALS = {DEFAULT: (1.1, 2.0, 3.0), INT4: (1.2, 2.0, 2.8)}


def _rows() -> list[Row]:
    settings = {
        "MODEL__SOURCE": "local",
        "MODEL__NAME": str(STAND_IN / "model"),
        "MODEL__ENGINE": "auto",
    }
    rows = [
        replace(ours("transformers", **settings, MODEL__QUANTIZATION=quantization), name=name)
        for name, quantization in ((DEFAULT, "auto"), (INT4, "int4"))
    ]
    for name, kind in ((LLAMA_8, "q8_0"), (LLAMA_4, "q4_0")):
        command = partial(peers.llama_server, model=STAND_IN / f"{kind}.gguf")
        rows.append(Row(name, command, route=Route.OPENAI_CHAT, is_ours=False))
    return rows


async def _figures(server: Server, name: str, *, quick: bool) -> dict[str, Any]:
    """One start's figures: tokens/s and TTFT by clients, seconds, and MiB."""
    found: dict[str, Any] = {"ready": server.ready_seconds or server.first_answer_seconds}
    workload = Workload(output_tokens=Lengths((OUTPUT_TOKENS,)))
    for clients in CLIENTS[:: 2 if quick else 1]:
        results = await run_round(
            server.target,
            workload,
            # Other prompts in each, which no cache knows.
            name=f"{name}, {clients} clients",
            requests=clients if quick else max(3, clients),
            clients=clients,
        )
        figures = summarise(results)
        found[f"speed {clients}"] = figures["tokens_per_second"]
        found[f"ttft {clients}"] = figures["ttft"]["p50"]
    found["memory"] = sum(server.memory().values())
    if not quick:
        long = Workload(prompt_words=Lengths((LONG_PROMPT_WORDS,)), output_tokens=Lengths((2,)))
        [result] = await run_round(server.target, long, name=name, requests=1, clients=1)
        found["long"] = result.ttft
    return found


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start each server in each round, and measure it alone: all together need too much memory."""
    if not STAND_IN.exists():
        say("Making the stand-in for gemma-2-2b, 10 GB")
        # In a process, because torch keeps much of the memory.
        make = [sys.executable, "-m", "benchmarks.stand_in", str(STAND_IN)]
        await asyncio.to_thread(subprocess.run, make, check=True, cwd=ROOT)
    only = options.only or ([DEFAULT, LLAMA_8] if options.quick else [""])
    rows = [row for row in _rows() if any(word in row.name for word in only)]
    count = 1 if options.quick else options.rounds
    found: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    absent: dict[str, str] = {}
    for number_of_round in range(count):
        for row in rows:
            try:
                server = await start(row)
            except StartError as error:
                absent[row.name] = str(error)
                continue
            try:
                name = f"large {number_of_round}"
                figures = await _figures(server, name, quick=options.quick)
            finally:
                server.stop()
            found[row.name].append(figures)
            say(f"{row.name}: {figures['speed 1']:.2f} tokens/s alone")
    described = await asyncio.to_thread(machine.describe, "cpu")
    return {"machine": described, "rounds": count, "found": found, "absent": absent}


def _median(data: dict[str, Any], row: str, key: str) -> float | None:
    values = [f[key] for f in data["found"].get(row, []) if f.get(key) is not None]
    return statistics.median(values) if values else None


def _ratio(data: dict[str, Any], ours: str, peer: str, key: str) -> float | None:
    return divide(_median(data, ours, key), _median(data, peer, key))


def ratios(data: dict[str, Any], name: str, peer: str) -> dict[str, Ratio]:
    """The goals of one of our rows with the ratios that were reached, by heading."""
    goals = {
        f"tokens/s, C = {c}": (f"speed {c}", g) for c, g in zip(CLIENTS, _GOALS[name], strict=True)
    }
    goals |= {"resident": ("memory", 1.2), "ready": ("ready", 2.0), "long prompt": ("long", 0.5)}
    return {
        what: Ratio(what, goal, key.startswith("speed"), _ratio(data, name, peer, key))
        for what, (key, goal) in goals.items()
    }


def render(data: dict[str, Any]) -> dict[str, str]:
    """The section that ``python -m benchmarks large`` writes."""
    header = [
        "",
        *(f"C = {c}: tokens/s · TTFT" for c in CLIENTS),
        "resident, MiB",
        "ready",
        f"TTFT of {LONG_PROMPT_WORDS} words",
    ]
    lines = []
    for row in data["found"]:
        figure = partial(_median, data, row)
        speeds = [
            f"{number(figure(f'speed {c}'))} · {seconds(figure(f'ttft {c}'))}" for c in CLIENTS
        ]
        others = [number(figure("memory")), seconds(figure("ready"))]
        lines.append([row, *speeds, *others, seconds(figure("long"))])
    for name, peer in ((DEFAULT, LLAMA_8), (INT4, LLAMA_4)):
        found = ratios(data, name, peer).values()
        lines.append([f"{name} ÷ {peer}", *(ratio.judged for ratio in found)])
    about = {k: v for k, v in data["machine"].items() if k in {"processor", "commit"}}
    parts = [machine.lines(about), table(header, lines)]
    parts += [f"- {name}: not started; {reason}" for name, reason in data["absent"].items()]
    return {"large model": "\n\n".join(parts)}
