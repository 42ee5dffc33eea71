"""``python -m benchmarks vllm``: this service with vLLM and ``vllm serve``, on the same weights.

In each round each server is started and measured alone, one after the other, because an idle
``vllm serve`` keeps a core busy.
"""

import argparse
import asyncio
from typing import Any

from benchmarks import machine, scenarios
from benchmarks.goals import GPU_CLIENTS, Ratio, median_of, speed_ratio
from benchmarks.load.report import number, seconds, table
from benchmarks.servers import VLLM, all_rows, ours, start
from benchmarks.side_by_side import say

_OURS = ours("vllm").name
_GOAL = 0.95


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the rounds; the JSON from which the table is made.

    Raises:
        StartError: A server cannot be started.
    """
    clients = GPU_CLIENTS if options.device == "cuda" else (1, 8)
    rows = [row for row in all_rows(options.device, ["vllm"]) if row.name in (_OURS, VLLM)]
    throughput: dict[str, Any] = {row.name: {str(c): [] for c in clients} for row in rows}
    for turn in range(options.rounds):
        for row in rows:
            server = await start(row)
            try:
                await scenarios.throughput(server, max(clients), "warm-up")
                for at_once in clients:
                    name = f"round {turn}, {at_once} clients"
                    figures = await scenarios.throughput(server, at_once, name)
                    throughput[row.name][str(at_once)].append(figures)
                    say(f"{name}: {row.name}: {figures['tokens_per_second']:.1f} tokens/s")
            finally:
                server.stop()
    described = await asyncio.to_thread(machine.describe, options.device)
    return {"machine": described, "rounds": options.rounds, "throughput": throughput}


def render(data: dict[str, Any]) -> str:
    """The medians of the rounds; the ratio is the median of the rounds' ratios."""
    lines = []
    for clients in map(int, data["throughput"][_OURS]):
        cells = [
            f"{number(median_of(data, name, clients, 'tokens_per_second'))} · "
            f"{seconds(median_of(data, name, clients, 'ttft', 'p50'))}"
            for name in (_OURS, VLLM)
        ]
        ratio = Ratio("tokens/s", _GOAL, True, speed_ratio(data, _OURS, VLLM, clients))
        lines.append([str(clients), *cells, ratio.judged])
    header = ["clients", "ours: tokens/s · TTFT p50", VLLM, "tokens/s, ours ÷ vLLM's"]
    return "\n\n".join([machine.lines(data["machine"]), table(header, lines)])
