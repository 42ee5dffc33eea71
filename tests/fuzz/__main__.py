"""The long run: ``python -m tests.fuzz [schema] [wire] [code]``; ``make fuzz`` runs all three.

It prints the number of cases, their rate and all failures; the status is 1 if there were any. Each
run has a new seed, which it prints; ``--seed`` repeats a run.
"""

import argparse
import asyncio
import importlib.util
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.fuzz import schema, wire
from tests.fuzz.targets import TARGETS
from tests.support.service import running_service

# The cases of one schema run are kept in memory until it ends.
_SCHEMA_CHUNK = 10_000


def _tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def fuzz_schema(options: argparse.Namespace) -> list[str]:
    """Send requests made from the OpenAPI document; return the failures."""
    found: list[str] = []
    done, started = 0, time.perf_counter()
    seed = options.seed
    while done < options.schema_cases and not found:
        part = schema.run(min(_SCHEMA_CHUNK, options.schema_cases - done), seed)
        done, seed = done + sum(part.cases.values()), seed + 1
        found += [f"{what}\n{how}" for what, how in part.failures.items()]
        found += [f"a task was left behind: {task}" for task in part.tasks]
        rate = done / (time.perf_counter() - started)
        _tell(f"schema: {done} cases, {rate:.0f}/s, {len(found)} findings; {dict(part.cases)}")
    return found


def fuzz_wire(options: argparse.Namespace) -> list[str]:
    """Send bytes to sockets; return the failures."""
    with running_service(**wire.SETTINGS) as service:
        before = asyncio.run(wire.warm_up(service))
        result = asyncio.run(wire.run(service.base_url, options.byte_cases, options.seed))
        found = [*result.failures, *wire.leaks(service, before), *wire.complaints(service)]
    rate = result.cases / result.seconds
    statuses = dict(sorted(result.statuses.items()))
    _tell(f"wire: {result.cases} cases, {rate:.0f}/s, {len(found)} findings; statuses {statuses}")
    return found


def fuzz_code(options: argparse.Namespace) -> list[str]:
    """Run every target under atheris, as many at a time as there are cores; return the failures."""
    if importlib.util.find_spec("atheris") is None:
        _tell("code: left out, since there is no atheris for this platform")
        return []
    found: list[str] = []
    waiting = list(TARGETS)
    with tempfile.TemporaryDirectory() as folder:
        running: dict[str, subprocess.Popen[bytes]] = {}
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                name = waiting.pop(0)
                running[name] = _start_guided(name, folder, options)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    found += _read_guided(name, folder, running.pop(name))
            time.sleep(0.2)
    return found


def _start_guided(name: str, folder: str, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    limits = [f"-runs={options.code_runs}", f"-max_total_time={options.code_seconds}"]
    shape = ["-max_len=200", "-len_control=0", f"-seed={options.seed % 2**31 or 1}"]
    safety = [f"-artifact_prefix={folder}/", "-timeout=20", "-rss_limit_mb=2048"]
    # Not a pipe: nobody reads it before the end, and a full pipe blocks its writer.
    with (Path(folder) / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.guided", name, *limits, *shape, *safety],
            stdout=subprocess.DEVNULL,
            stderr=log,
        )


def _read_guided(name: str, folder: str, process: subprocess.Popen[bytes]) -> list[str]:
    log = (Path(folder) / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    ends = [line for line in log.splitlines() if "DONE" in line]
    _tell(f"code: {name}: status {process.returncode}; {ends[-1].strip() if ends else 'no end'}")
    return [] if process.returncode == 0 else [f"{name}: {log[-4000:]}"]


PARTS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "schema": fuzz_schema,
    "wire": fuzz_wire,
    "code": fuzz_code,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named parts, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="schema|wire|code", default=[])
    add = parser.add_argument
    add("--schema-cases", type=int, default=100_000)
    add("--byte-cases", type=int, default=1_000_000)
    add("--code-runs", type=int, default=1_000_000, help="of each target")
    add("--code-seconds", type=int, default=300, help="the most for each target")
    add("--seed", type=int, default=secrets.randbelow(2**31))
    options = parser.parse_args(arguments)
    unknown = set(options.parts) - PARTS.keys()
    if unknown:
        parser.error(f"there is no part {unknown.pop()!r}")
    _tell(f"seed {options.seed}")
    found: list[str] = []
    for name in options.parts or PARTS:
        # Flushed, because the next part may take an hour.
        for finding in (new := PARTS[name](options)):
            _tell(f"\n--- found ---\n{finding}")
        found += new
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
