"""Reads a service's use of memory, files, threads, tasks and places, to find leaks."""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.load.transport import HttpClient

GAUGES = {
    "tasks": "event_loop_tasks",
    "running": "llm_requests_running",
    "waiting": "llm_requests_waiting",
    "sessions": "chat_sessions_active",
}
"""Names of counts, and the metrics of the service with their values."""

# Growth that is allowed: a share of the memory or MiB, whichever is more.
_GROWTH_SHARE = 0.05
_GROWTH_MIB = 16.0
# asyncio's pool starts a thread when all that it has are busy, up to so many, and keeps them.
_POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)


def has_grown(before: float, after: float) -> bool:
    """Whether a process's memory in MiB has grown by more than an allocator's variation."""
    return after - before > max(_GROWTH_MIB, _GROWTH_SHARE * before)


@dataclass(frozen=True, slots=True)
class ProcessVitals:
    """The resources of a process: its kind, and resident MiB."""

    label: str
    pid: int
    memory: float
    files: int
    threads: int


def processes_of(session: int) -> list[ProcessVitals]:
    """The running processes of a session; none where there is no /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        # A process that ends meanwhile has no files, or no memory.
        with suppress(OSError, KeyError):
            # "pid (name) state ppid pgrp session …", where the name may have spaces and brackets.
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(stat[3]) != session or stat[0] in "ZX":
                continue
            status = (folder / "status").read_text().splitlines()
            fields = dict(line.split(":", 1) for line in status)
            found.append(
                ProcessVitals(
                    label=_label_of((folder / "cmdline").read_bytes().split(b"\0")),
                    pid=int(folder.name),
                    memory=int(fields["VmRSS"].split()[0]) / 1024,
                    files=len(list((folder / "fd").iterdir())),
                    threads=int(fields["Threads"]),
                )
            )
    return found


def _label_of(words: Sequence[bytes]) -> str:
    """The kind of process that a command line of this service starts."""
    if b"app.llm.engine.worker" in words:
        return "engine"
    return "API" if b"uvicorn" in words else "other"


def counts(session: int, metrics: str) -> dict[str, float]:
    """What a service uses but memory, by name; at rest it is the same as before.

    Args:
        session: Id of its processes' session, which is the API process's id.
        metrics: The text of ``/metrics``.
    """
    samples = {s.name: s.value for f in text_string_to_metric_families(metrics) for s in f.samples}
    found = {name: samples[metric] for name, metric in GAUGES.items()}
    for process in processes_of(session):
        for name in ("pid", "files", "threads"):
            found[f"{process.label}: {name}"] = getattr(process, name)
    return found


def leaks(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Each count that is not what it was before, in words.

    Threads may be more by those that asyncio's pool had not started before.
    """
    found = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, 0), after.get(name, 0)
        pooled = name.endswith(": threads") and not name.startswith("engine")
        if not old <= new <= (old + _POOL_THREADS if pooled else old):
            found.append(f"{name}: {old} before, {new} after")
    return found


class Observer:
    """Reads what a service uses over ``/metrics`` and /proc.

    Args:
        base_url: The service's address.
        session: Id of its processes' session.
    """

    def __init__(self, base_url: str, session: int) -> None:
        self._http = HttpClient(base_url, time_limit=120.0)
        self._session = session
        self.memory: list[tuple[float, dict[str, float]]] = []
        self.probes: list[float] = []

    async def metrics(self) -> str:
        """The text of ``/metrics``."""
        exchange = await self._http.get("/metrics")
        return b"".join(piece for _, piece in exchange.pieces).decode()

    async def counts(self) -> dict[str, float]:
        """See :func:`counts`."""
        return counts(self._session, await self.metrics())

    async def watch_memory(self, interval: float) -> None:
        """Append the time and each process's MiB to ``memory`` until cancelled."""
        while True:
            processes = await asyncio.to_thread(processes_of, self._session)
            memory = {process.label: process.memory for process in processes}
            self.memory.append((time.monotonic(), memory))
            await asyncio.sleep(interval)

    async def watch_probe(self, interval: float) -> None:
        """Append the seconds that ``/livez`` takes to ``probes`` until cancelled.

        A probe that fails counts as infinitely slow.
        """
        while True:
            exchange = await self._http.get("/livez")
            succeeded = exchange.status == 200 and exchange.failure is None
            seconds = exchange.ended_at - exchange.sent_at
            self.probes.append(seconds if succeeded else float("inf"))
            await asyncio.sleep(interval)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
