"""``python -m benchmarks overload``: many times more requests than the service can answer.

A closed loop that keeps the batch full measures the peak. Then requests arrive in an open loop at a
multiple of the peak's rate. The speed of the machine drifts by as much as the overload may cost, so
peaks and overloads alternate, and each overload is compared with the peaks before and after it.
"""

import argparse
import asyncio
import statistics
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks import vitals
from benchmarks.load.report import number, seconds, table
from benchmarks.load.results import Outcome, Result, percentile, summarise
from benchmarks.load.rounds import run_round
from benchmarks.load.targets import Target
from benchmarks.load.workload import Lengths, Workload
from benchmarks.servers import Row, ours, start

# Places in the queue of the overloaded service: enough to keep the batch full.
_WAITING = "32"
# More than the 32 slots, and fewer than slots and places together, so that none is rejected.
_PEAK_CLIENTS = 48
PEAK_REQUESTS = 480
# With answers of one length the clients of a closed loop stay in step, and their prompts are read
# together. Lengths vary, so that the peak is that of requests that arrive at random.
_WORKLOAD = Workload(output_tokens=Lengths((16, 48), uniform=True))
# Share of a round at its beginning and end, in which the batch is filled and drained.
_SETTLING = 0.25
_PROBE_SECONDS = 0.1
_MEMORY_SECONDS = 1.0
# The share of the peak's tokens/s that the reliability page promises under an overload.
LEAST_SHARE = 0.90
# A bucket of event_loop_lag_seconds.
_LAG_BOUND = 0.02


def steady_rate(results: Sequence[Result], begin: float, end: float) -> float:
    """Tokens a second between two times, by the arrival times of the pieces of text.

    Each piece counts as an equal share of its stream's tokens.
    """
    tokens = 0.0
    for result in results:
        times = result.text_at
        if result.outcome is Outcome.COMPLETED and times:
            tokens += sum(begin <= at < end for at in times) * result.tokens / len(times)
    return tokens / (end - begin)


def window(results: Sequence[Result], *, last_sent: bool) -> tuple[float, float]:
    """The begin and end of a round's steady state."""
    begin = min(r.sent_at for r in results)
    end = max(r.sent_at if last_sent else r.ended_at for r in results)
    margin = min(_SETTLING * (end - begin), 10.0)
    return begin + margin, end if last_sent else end - margin


async def _peak(
    target: Target, session: int, requests: int, number_of_peak: int
) -> tuple[float, float]:
    """Tokens a second at the peak, and mean tokens of an answer."""
    # Observing takes time from the service, so the peak is observed like the overload.
    async with _observed(target, session):
        # Each peak has other prompts, because the engine's prefix cache has those of the last one.
        results = await run_round(
            target,
            _WORKLOAD,
            name=f"peak {number_of_peak}",
            requests=requests,
            clients=_PEAK_CLIENTS,
        )
    done = [r.tokens for r in results if r.outcome is Outcome.COMPLETED]
    return steady_rate(results, *window(results, last_sent=False)), statistics.mean(done or [1])


@asynccontextmanager
async def _observed(target: Target, session: int) -> AsyncIterator[vitals.Observer]:
    """Probe a service and record its memory in the block."""
    observer = vitals.Observer(target.base_url, session)
    watching = [
        asyncio.create_task(observer.watch_probe(_PROBE_SECONDS)),
        asyncio.create_task(observer.watch_memory(_MEMORY_SECONDS)),
    ]
    try:
        yield observer
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        observer.close()


def _count(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def _counted(before: str, after: str, route: str) -> dict[str, Any]:
    """The service's own counts between two readings of its metrics."""

    def more(name: str, **labels: str) -> float:
        return _count(after, name, **labels) - _count(before, name, **labels)

    late = more("event_loop_lag_seconds_count")
    bounded = more("event_loop_lag_seconds_bucket", le=str(_LAG_BOUND))
    answered = {"endpoint": route, "method": "POST"}
    return {
        "lag_share": bounded / late if late else None,
        "counted": more("http_requests_total", **answered),
        "counted_completed": more("http_requests_total", status="200", **answered),
        "counted_refused": more("http_requests_total", status="503", **answered),
    }


async def _one(
    target: Target, session: int, rate: float, duration: float, name: str
) -> dict[str, Any]:
    """Send requests at ``rate`` for ``duration`` seconds; the figures."""
    async with _observed(target, session) as observer:
        before = await observer.metrics()
        results = await run_round(
            target, _WORKLOAD, name=name, requests=max(1, int(rate * duration)), rate=rate
        )
        after = await observer.metrics()
    waits = [r.seconds for r in results if r.outcome is Outcome.REFUSED]
    # The first quarter is left out: memory that is used for the first time is no growth.
    memory = [sample for _, sample in observer.memory[len(observer.memory) // 4 :]]
    return {
        "rate": rate,
        "steady": steady_rate(results, *window(results, last_sent=True)),
        "refusal_p99": percentile(waits, 99),
        "livez_p99": percentile(observer.probes, 99),
        "memory": {label: (memory[0][label], memory[-1][label]) for label in memory[-1]},
        **_counted(before, after, target.path),
        **summarise(results),
    }


async def overload(
    target: Target,
    session: int,
    *,
    factor: float,
    duration: float,
    rounds: int,
    peak_requests: int = PEAK_REQUESTS,
) -> dict[str, Any]:
    """Measure peaks and overloads alternately.

    Args:
        target: A service with few places in its queue.
        session: Id of its processes' session.
        factor: Rate of requests as a multiple of the peak's.
        duration: Seconds of each overload.
        rounds: Number of overloads.
        peak_requests: Requests of each peak.

    Returns:
        The figures of each round, with the peaks around it and the ratio to their mean.
    """
    peak, tokens = await _peak(target, session, peak_requests, 0)
    found: list[dict[str, Any]] = []
    for number_of_round in range(rounds):
        rate = factor * peak / tokens
        one = await _one(target, session, rate, duration, f"overload {number_of_round}")
        following, tokens = await _peak(target, session, peak_requests, number_of_round + 1)
        mean = (peak + following) / 2
        found.append({"peak": mean, "ratio": one["steady"] / mean if mean else None, **one})
        peak = following
        print(f"overload: {number(one['steady'])} of {number(mean)} tokens/s", flush=True)
    return {"factor": factor, "duration": duration, "rounds": found}


def limited(engine: str, device: str = "cpu") -> Row:
    """The row of a service with few places in its queue."""
    return ours(engine, device, ENGINE__MAX_WAITING=_WAITING)


def _worst(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _verdict(ok: bool | None, bound: str) -> str:
    return f"{bound}: {'-' if ok is None else 'met' if ok else 'missed'}"


def _at_most(value: float | None, bound: float) -> str:
    return _verdict(None if value is None else value <= bound, f"≤ {seconds(bound)}")


def render(found: Mapping[str, Any]) -> str:
    """The figures as a table: the median of the ratios, and the worst of all other figures."""
    rounds = found["rounds"]

    def each(name: str, show: Any = number) -> str:
        return ", ".join(show(one[name]) for one in rounds)

    ratios = [one["ratio"] for one in rounds if one["ratio"] is not None]
    ratio = statistics.median(ratios) if ratios else None
    refusal, livez = (
        _worst([one[name] for one in rounds]) for name in ("refusal_p99", "livez_p99")
    )
    lag = min((one["lag_share"] for one in rounds if one["lag_share"] is not None), default=None)
    once = all(
        (one["sent"], one["completed"], one["refused"], one["failed"])
        == (one["counted"], one["counted_completed"], one["counted_refused"], 0)
        for one in rounds
    )
    ended = "; ".join(
        "/".join(number(one[name]) for name in ("sent", "completed", "refused", "failed"))
        for one in rounds
    )
    lines = [
        ["offered, requests/s", each("rate"), ""],
        ["sent / completed / rejected / failed", ended, _verdict(once, "as the service counted")],
        ["tokens/s at the peak", each("peak"), ""],
        ["tokens/s under the overload", each("steady"), ""],
        ["overload ÷ peak", each("ratio", "{:.2f}".format), ""],
        [
            "their median",
            "-" if ratio is None else f"{ratio:.2f}",
            _verdict(None if ratio is None else ratio >= LEAST_SHARE, f"≥ {LEAST_SHARE:.2f}"),
        ],
        ["rejections, p99", seconds(refusal), _at_most(refusal, 0.05)],
        ["/livez, p99", seconds(livez), _at_most(livez, 0.25)],
        [
            f"event loop late by at most {seconds(_LAG_BOUND)}",
            "-" if lag is None else f"{lag:.1%}",
            _verdict(None if lag is None else lag >= 0.99, "≥ 99 %"),
        ],
        *_memory(rounds),
    ]
    title = f"{found['factor']:g} times the saturating load, {found['duration']:g} s a round"
    return table([title, "", ""], lines)


def _memory(rounds: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    lines = []
    for label in rounds[0]["memory"]:
        shown = ", ".join("{:.0f}-{:.0f}".format(*one["memory"][label]) for one in rounds)
        flat = not any(vitals.has_grown(*one["memory"][label]) for one in rounds)
        lines.append([f"memory of the {label} process, MiB", shown, _verdict(flat, "flat")])
    return lines


async def measure(options: argparse.Namespace) -> str:
    """Start the service and overload it; the table of figures."""
    server = await start(limited(options.engine, options.device))
    try:
        found = await overload(
            server.target,
            server.process.pid,
            factor=options.factor,
            duration=options.seconds,
            rounds=options.rounds,
        )
    finally:
        server.stop()
    return render(found)
