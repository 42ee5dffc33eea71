"""``python -m benchmarks large | table | curve | vllm | overload | soak | page``."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import beside_vllm, curve, large, overload, page, plots, side_by_side, soak
from benchmarks.load.rounds import run
from benchmarks.paths import MODEL, RESULTS
from benchmarks.servers import ENGINES

_MEASURE = {"large": large.measure, "table": side_by_side.measure, "curve": curve.measure}
_RENDER = {"large": large.render, "table": page.render, "curve": curve.render}
_PLOT = {"table": plots.side_by_side, "curve": plots.curves}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("table", "the service beside other servers (about 20 minutes)"),
        ("large", "a model of 2.6 billion parameters beside llama-server (25 minutes)"),
        ("curve", "throughput and TTFT by load and prompt length, overload (12 minutes)"),
    ):
        command = commands.add_parser(name, help=text)
        add = command.add_argument
        add("--quick", action="store_true", help="a smoke test that does not write the page")
        add("--device", choices=("cpu", "cuda"), default="cpu")
        add("--engine", action="append", help="measure only this engine; may be repeated")
        add("--rounds", type=int, default=3)
        if name != "curve":
            add(
                "--only",
                action="append",
                help="measure only rows with this text in their name; does not write the page",
            )
    command = commands.add_parser("soak", help="mixed traffic for a long time, and what it leaks")
    command.add_argument("--minutes", type=float, default=10.0)
    command.add_argument("--clients", type=int, default=8)
    command.add_argument("--engine", default="openvino", choices=ENGINES)
    command = commands.add_parser("overload", help="many times the capacity")
    command.add_argument("--factor", type=float, default=10.0)
    command.add_argument("--rounds", type=int, default=1)
    command.add_argument("--seconds", type=float, default=120.0)
    command.add_argument("--engine", default="openvino", choices=ENGINES)
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command = commands.add_parser("vllm", help="vLLM in this service beside vllm serve (8 minutes)")
    command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    command.add_argument("--rounds", type=int, default=3)
    commands.add_parser("page", help="write docs/performance.md from the stored results")
    return parser


def _keep(name: str, data: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1), encoding="utf-8")


def _publish(name: str, data: dict[str, Any]) -> None:
    page.write(_RENDER[name](data))
    if name in _PLOT:
        _PLOT[name](data)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "page":
        for name in _RENDER:
            path = RESULTS / f"{name}.json"
            if path.exists():
                _publish(name, json.loads(path.read_text(encoding="utf-8")))
        return 0
    if options.command == "soak":
        report = run(soak.measure(options))
        problems = report.problems()
        print("\n".join([report.describe(), "", *(problems or ["Nothing was leaked."])]))
        return 1 if problems else 0
    if options.command == "overload":
        print(run(overload.measure(options)))
        return 0
    if options.command == "vllm":
        data = run(beside_vllm.measure(options))
        _keep("vllm", data)
        print(beside_vllm.render(data))
        return 0
    data = run(_MEASURE[options.command](options))
    # A smoke test, a part and a run on a GPU do not replace the figures of the page.
    kept = options.command + ("-quick" if options.quick else "")
    kept += "-part" if getattr(options, "only", None) else ""
    kept += "-cuda" if options.device == "cuda" else ""
    kept += f"-{MODEL.name}" if os.environ.get("BENCH_MODEL") else ""
    _keep(kept, data)
    for title, body in _RENDER[options.command](data).items():
        print(f"\n## {title}\n\n{body}")
    if kept == options.command:
        _publish(options.command, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
