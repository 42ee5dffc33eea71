"""``python -m benchmarks.load``: puts a server under load and prints its figures."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.load.report import describe
from benchmarks.load.results import LatencyTarget, median_figures, summarise
from benchmarks.load.rounds import run, run_round
from benchmarks.load.targets import Route, Target
from benchmarks.load.workload import Lengths, Workload, WorkloadError


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except WorkloadError as error:
        # argparse shows the message of this type only.
        raise argparse.ArgumentTypeError(str(error)) from None


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description="Put this service, or any server with OpenAI's API, under load.",
        epilog="Lengths are 32 (fixed), 16-128 (uniform) or 16,64,256 (drawn from a list).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server's address, without /v1")
    add("--route", type=Route, choices=list(Route), default=Route.CHAT, help="default: chat")
    add("--key", default="", help="API key; default: the variable LLM_SERVICE_KEY, else none")
    add("--model", default="default", help="model name for OpenAI's routes")
    add("--system", help="system message of chats")
    add("--temperature", type=float, default=0.0)
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--clients", type=int, help="closed loop: concurrent clients (default: 8)")
    load.add_argument("--rate", type=float, help="open loop: requests/s of a Poisson process")
    add("--requests", type=int, help="requests a round (default: 4 a client, or 64)")
    add("--rounds", type=int, default=3, help="rounds; the medians are printed (default: 3)")
    add("--warm-up", type=int, help="requests before the first round (default: 1 a client)")
    add("--prompt", type=_lengths, default="16", metavar="LENGTHS", help="words of a prompt")
    add("--output", type=_lengths, default="32", metavar="LENGTHS", help="most tokens")
    add("--seed", type=int, default=0, help="seed of prompts, lengths and arrival times")
    add("--max-ttft", type=float, metavar="SECONDS", help="goodput: most time to the first token")
    add("--max-latency", type=float, metavar="SECONDS", help="goodput: most time to the last byte")
    add("--timeout", type=float, default=300.0, metavar="SECONDS", help="of one request")
    add("--json", type=Path, metavar="FILE", help="write the figures of all rounds to FILE")
    return parser


async def measure(options: argparse.Namespace, target: Target) -> list[dict[str, Any]]:
    """Run the warm-up and the rounds; one summary a round."""
    workload = Workload(options.prompt, options.output, options.seed)
    clients = options.clients or (None if options.rate else 8)
    requests = options.requests or 4 * (clients or 16)
    warm_up = (clients or 8) if options.warm_up is None else options.warm_up
    bounds = LatencyTarget(options.max_ttft, options.max_latency)
    send = partial(run_round, target, workload, time_limit=options.timeout)
    if warm_up:
        await send(name="warm-up", requests=warm_up, clients=min(warm_up, clients or 8))
    summaries = []
    for number in range(options.rounds):
        results = await send(
            name=f"round {number}", requests=requests, clients=clients, rate=options.rate
        )
        summaries.append(summarise(results, bounds))
    return summaries


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, which is 1 when no request was completed."""
    options = build_parser().parse_args(arguments)
    target = Target(
        base_url=options.url.rstrip("/").removesuffix("/v1"),
        route=options.route,
        key=options.key or os.environ.get("LLM_SERVICE_KEY", ""),
        model=options.model,
        system=options.system,
        temperature=options.temperature,
    )
    try:
        summaries = run(measure(options, target))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    medians = median_figures(summaries)
    bounded = options.max_ttft is not None or options.max_latency is not None
    rounds = "one round" if options.rounds == 1 else f"medians of {options.rounds} rounds"
    sys.stdout.write(f"{options.route} at {target.base_url}, {rounds}\n\n")
    sys.stdout.write(describe(medians, bounded=bounded) + "\n")
    if options.json:
        _write(options, summaries, medians)
    return 0 if medians["completed"] else 1


def _write(
    options: argparse.Namespace, summaries: list[dict[str, Any]], medians: dict[str, Any]
) -> None:
    asked = {name: str(value) for name, value in vars(options).items() if value is not None}
    asked.pop("key")
    report = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "client": {"python": platform.python_version(), "httptools": version("httptools")},
        "options": asked,
        "medians": medians,
        "rounds": summaries,
    }
    options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
