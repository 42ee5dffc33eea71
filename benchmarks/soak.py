"""``python -m benchmarks soak``: hours of mixed traffic, and a check for leaks.

The service's files, threads, tasks, sessions and requests are counted at rest, after a warm-up and
again after the traffic, and must be the same. Memory is recorded during the traffic, because an
allocator keeps what it once had, and must not grow.
"""

import argparse
import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from random import Random
from typing import Any

import msgspec

from benchmarks import vitals
from benchmarks.load.report import number, table
from benchmarks.load.results import Outcome, result_of
from benchmarks.load.targets import Route, Target
from benchmarks.load.transport import Exchange, HttpClient
from benchmarks.load.workload import Lengths, PlannedRequest, Workload
from benchmarks.servers import ours, start

# Numbers of sessions and of repeated prompts.
_SESSIONS = 32
_REPEATED = 20
_SETTLE_SECONDS = 30.0
STILL_SECONDS = 3.0
_TIME_LIMIT = 120.0

SETTINGS = {
    "PII__INPUT": "redact",
    "PII__OUTPUT": "redact",
    # Small enough to be full after the warm-up.
    "CACHE__SIZE": "100",
    "CHAT_HISTORY__MAX_SESSIONS": "64",
}

_OVERSIZED = b'{"prompt": "' + b"a" * 2_000_000 + b'"}'
# A path, a body, and the status of the error.
_BAD: tuple[tuple[str, bytes, int], ...] = (
    ("/v1/generate", b"{", 400),
    ("/v1/generate", b'{"prompt": "\xff"}', 400),
    ("/v1/generate", b'{"prompt": ""}', 422),
    ("/v1/generate", b'{"prompt": "a", "unknown": 1}', 422),
    ("/v1/generate", _OVERSIZED, 413),
    ("/v1/chat", b'{"messages": [{"role": "user", "content": 5}]}', 422),
    ("/v1/chat/completions", b'{"model": "default", "messages": []}', 400),
    ("/v1/chat/completions", b'{"model": "m", "messages": [{"role":"user","content":"a"}]}', 404),
    ("/v1/nothing", b"{}", 404),
    ("/livez", b"{}", 405),
)
_PERSONAL = "Write to jane.doe@example.com or call 415-555-2671, card 4111 1111 1111 1111."


@dataclass
class Tally:
    """How many requests of each kind were sent, and how many answers were unexpected."""

    requests: Counter[str] = field(default_factory=Counter)
    surprises: Counter[str] = field(default_factory=Counter)


class Traffic:
    """Random requests of every kind; 5 % disconnect before the end, 5 % are invalid."""

    def __init__(self, target: Target, seed: int) -> None:
        self.tally = Tally()
        self._http = HttpClient(target.base_url, time_limit=_TIME_LIMIT)
        self._target = target
        self._random = Random(seed)  # noqa: S311 - repeatable, not secret
        self._prompts = _prompts(seed)
        self._kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "stream": (35, self._stream),
            "whole": (15, self._whole),
            "turn of a session": (20, self._turn),
            "repeated": (15, self._repeated),
            "personal data": (5, self._personal),
            "left": (5, self._leave),
            "mistake": (5, self._mistake),
        }

    async def run(self, seconds: float, clients: int) -> None:
        """Run ``clients`` clients, each of which sends a request when its last one has ended."""
        end = time.monotonic() + seconds
        weights = [weight for weight, _ in self._kinds.values()]

        async def client() -> None:
            while time.monotonic() < end:
                (kind,) = self._random.choices(list(self._kinds), weights)
                self.tally.requests[kind] += 1
                await self._kinds[kind][1]()

        await asyncio.gather(*(client() for _ in range(clients)))

    async def end(self) -> None:
        """Delete the sessions and close the connections."""
        for name in range(_SESSIONS):
            await self._delete(name)
        self._http.close()

    async def _stream(self) -> None:
        route = self._random.choice(list(Route))
        target = replace(self._target, route=route)
        body = target.body(next(self._prompts))
        result = result_of(await self._http.post(target.path, body, target.headers))
        if result.outcome is not Outcome.COMPLETED:
            self.tally.surprises[f"stream, {route}: {result.error}"] += 1

    async def _whole(self) -> None:
        request = next(self._prompts)
        await self._post(
            "whole", "/v1/chat", _chat(request.prompt, request.max_tokens, cache=False)
        )

    async def _turn(self) -> None:
        name, request = self._random.randrange(_SESSIONS), next(self._prompts)
        if self._random.random() < 0.1:
            await self._delete(name)
        # 409: another client has a turn in this session.
        body = _chat(request.prompt, request.max_tokens, session_id=f"soak-{name}")
        await self._post("turn", "/v1/chat", body, (200, 409))

    async def _repeated(self) -> None:
        asked = {"prompt": f"Question {self._random.randrange(_REPEATED)}", "temperature": 0}
        stream = self._random.random() < 0.5
        await self._post("repeated", "/v1/generate", {**asked, "max_tokens": 16, "stream": stream})

    async def _personal(self) -> None:
        text = f"{_PERSONAL} {self._random.random()}"
        await self._post("personal data", "/v1/chat", _chat(text, 16))

    async def _leave(self) -> None:
        """Disconnect after up to a second: while the request waits, runs or streams."""
        http = HttpClient(self._target.base_url, time_limit=self._random.uniform(0.001, 1.0))
        body = self._target.body(replace(next(self._prompts), max_tokens=200))
        exchange = await http.post(self._target.path, body, self._target.headers)
        http.close()
        if exchange.failure is None and exchange.status != 200:
            self.tally.surprises[f"left: {exchange.status}"] += 1

    async def _mistake(self) -> None:
        path, body, status = self._random.choice(_BAD)
        if self._random.random() < 0.1:
            self._expect("no key", await self._http.post(self._target.path, body, {}), (401, 413))
        else:
            exchange = await self._http.post(path, body, self._target.headers)
            self._expect(f"mistake on {path}", exchange, (status,))

    async def _post(
        self, kind: str, path: str, body: Mapping[str, Any], expected: tuple[int, ...] = (200,)
    ) -> None:
        data = msgspec.json.encode(body)
        self._expect(kind, await self._http.post(path, data, self._target.headers), expected)

    async def _delete(self, name: int) -> None:
        path = f"/v1/sessions/soak-{name}"
        self._expect("delete", await self._http.delete(path, self._target.headers), (204, 404))

    def _expect(self, kind: str, exchange: Exchange, expected: tuple[int, ...]) -> None:
        if exchange.failure is not None or exchange.status not in expected:
            self.tally.surprises[f"{kind}: {exchange.failure or exchange.status}"] += 1


def _prompts(seed: int) -> Iterator[PlannedRequest]:
    workload = Workload(Lengths((2, 200), uniform=True), Lengths((1, 48), uniform=True), seed)
    for part in count():
        yield from workload.plan(500, round_name=f"soak {part}")


def _chat(text: str, max_tokens: int, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, **fields}


# --- Leaks ----------------------------------------------------------------------------------------


async def settled(
    observer: vitals.Observer, wanted: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The counts once they are as wanted, or do not change for 3 s; waits 30 s at most."""
    end = time.monotonic() + _SETTLE_SECONDS
    now, since = await observer.counts(), time.monotonic()
    while time.monotonic() < end and (wanted is None or vitals.leaks(wanted, now)):
        await asyncio.sleep(0.5)
        last, now = now, await observer.counts()
        if now != last:
            since = time.monotonic()
        elif wanted is None and time.monotonic() - since > STILL_SECONDS:
            break
    return now


@dataclass
class Report:
    """The findings of a run.

    Attributes:
        seconds: Duration without the warm-up.
        start: Counts at rest after the warm-up.
        end: Counts at rest after the traffic.
        memory: Samples of each process: seconds and MiB.
    """

    tally: Tally
    seconds: float
    start: Mapping[str, float]
    end: Mapping[str, float]
    memory: Mapping[str, list[tuple[float, float]]]

    def problems(self) -> list[str]:
        """Unexpected answers, changed counts and growing memory, one line each."""
        found = [f"{times} times: {what}" for what, times in self.tally.surprises.items()]
        found += vitals.leaks(self.start, self.end)
        for label, samples in self.memory.items():
            before, after = _quarter(samples, 1), _quarter(samples, 3)
            if vitals.has_grown(before, after):
                found.append(f"{label}: grew from {before:.0f} to {after:.0f} MiB")
        return found

    def describe(self) -> str:
        """The figures as tables."""
        kinds = [[kind, number(n)] for kind, n in sorted(self.tally.requests.items())]
        total = self.tally.requests.total()
        kinds.append(["all", f"{number(total)} ({total / self.seconds:.1f}/s)"])
        counts = [[n, number(v), number(self.end.get(n))] for n, v in self.start.items()]
        memory = [
            [label, *(f"{_quarter(samples, n):.1f}" for n in range(4)), f"{slope(samples):+.2f}"]
            for label, samples in self.memory.items()
        ]
        quarters = ["MiB, median of quarter", "1", "2", "3", "4", "MiB/h over the last half"]
        parts = (
            table(["requests", "sent"], kinds),
            table(["at rest", "before", "after"], counts),
            table(quarters, memory),
        )
        return "\n\n".join(parts)


def _quarter(samples: list[tuple[float, float]], which: int) -> float:
    part = samples[len(samples) * which // 4 : len(samples) * (which + 1) // 4]
    return statistics.median(memory for _, memory in part or samples)


def slope(samples: list[tuple[float, float]]) -> float:
    """MiB an hour by least squares over the second half; 0 with fewer than two samples."""
    half = samples[len(samples) // 2 :]
    if len(half) < 2:
        return 0.0
    return 3600 * statistics.linear_regression(*zip(*half, strict=True)).slope


async def soak(
    target: Target, session: int, *, seconds: float, warm_up: float, clients: int
) -> Report:
    """Put a running service under mixed traffic and look for leaks.

    Args:
        target: The service, with a native route.
        session: Id of its processes' session.
        seconds: Duration of the traffic.
        warm_up: Duration of the traffic before that, until caches are full.
        clients: Number of concurrent requests.
    """
    observer = vitals.Observer(target.base_url, session)
    warming = Traffic(target, seed=1)
    await warming.run(warm_up, clients)
    await warming.end()
    start_counts = await settled(observer)
    traffic = Traffic(target, seed=0)
    watching = asyncio.create_task(observer.watch_memory(max(seconds / 240, 0.1)))
    began = time.monotonic()
    await traffic.run(seconds, clients)
    lasted = time.monotonic() - began
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await traffic.end()
    end_counts = await settled(observer, start_counts)
    observer.close()
    labels = {label for _, memory in observer.memory for label in memory}
    memory = {
        label: [(at, m[label]) for at, m in observer.memory if label in m]
        for label in sorted(labels)
    }
    return Report(traffic.tally, lasted, start_counts, end_counts, memory)


async def measure(options: argparse.Namespace) -> Report:
    """Start the service and soak it; the findings."""
    server = await start(ours(options.engine, **SETTINGS))
    try:
        return await soak(
            replace(server.target, system=None),
            server.process.pid,
            seconds=60 * options.minutes,
            warm_up=min(120.0, 12 * options.minutes),
            clients=options.clients,
        )
    finally:
        server.stop()
