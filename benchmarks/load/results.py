"""From what arrived to what it means: one outcome for each request, and figures for each round."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any

import msgspec

from benchmarks.load.targets import Stream, error_text, read_stream
from benchmarks.load.transport import Exchange

REFUSALS = (429, 503)
PERCENTILES = (50, 90, 99)


class Outcome(StrEnum):
    """How a request ended; each ends in exactly one of these ways."""

    COMPLETED = "completed"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one request. Durations are seconds from its sending.

    Attributes:
        outcome: Completed; refused with 429 or 503; failed in any other way.
        sent_at: When it was sent, on ``time.perf_counter``'s clock.
        seconds: To the last byte, or to the failure.
        lag: How late it was sent, against the plan of an open loop.
        error: Why it was refused or failed.
        ttft: To the first piece of text.
        gaps: Between two pieces of text.
        tokens: Tokens of the answer: the server's count, else the pieces of text.
        tokens_reported: Whether that is the server's count.
        prompt_tokens: The server's count, where it reports one.
        text: The answer.
        resent: Whether it was sent again because a kept connection had been closed.
    """

    outcome: Outcome
    sent_at: float
    seconds: float
    lag: float = 0.0
    error: str | None = None
    ttft: float | None = None
    gaps: tuple[float, ...] = ()
    tokens: int = 0
    tokens_reported: bool = False
    prompt_tokens: int | None = None
    text: str = ""
    resent: bool = False

    @property
    def ended_at(self) -> float:
        """When it ended."""
        return self.sent_at + self.seconds

    @property
    def time_per_token(self) -> float | None:
        """Mean seconds for each token after the first (TPOT)."""
        if self.ttft is None or self.tokens < 2:
            return None
        return sum(self.gaps) / (self.tokens - 1)


def result_of(exchange: Exchange) -> Result:
    """Read what came back for one request."""
    stream = Stream()
    outcome, error = Outcome.FAILED, exchange.failure
    if exchange.status in REFUSALS and error is None:
        outcome, error = Outcome.REFUSED, _refusal(exchange)
    elif exchange.status != 200:
        error = error or f"status {exchange.status}: {_refusal(exchange)}"
    else:
        stream = read_stream(exchange.pieces)
        error = error or stream.error
        if error is None and not (stream.done or stream.finish_reason):
            error = "the stream ended without a last event"
        if error is None:
            outcome = Outcome.COMPLETED
    times = stream.text_at
    reported = stream.completion_tokens is not None
    return Result(
        outcome=outcome,
        sent_at=exchange.sent_at,
        seconds=exchange.ended_at - exchange.sent_at,
        lag=exchange.sent_at - exchange.planned_at,
        error=error,
        ttft=times[0] - exchange.sent_at if times else None,
        gaps=tuple(later - earlier for earlier, later in pairwise(times)),
        tokens=stream.completion_tokens if stream.completion_tokens is not None else len(times),
        tokens_reported=reported,
        prompt_tokens=stream.prompt_tokens,
        text=stream.text,
        resent=exchange.resent,
    )


def _refusal(exchange: Exchange) -> str:
    body = b"".join(piece for _, piece in exchange.pieces)
    try:
        return error_text(msgspec.json.decode(body))
    except msgspec.DecodeError:
        return f"status {exchange.status}"


@dataclass(frozen=True, slots=True)
class LatencyTarget:
    """Bounds on latency; a completed request within all of them counts as good.

    Attributes:
        ttft: Most seconds to the first piece of text.
        seconds: Most seconds to the last byte.
    """

    ttft: float | None = None
    seconds: float | None = None

    def holds(self, result: Result) -> bool:
        """Whether a request was good."""
        if result.outcome is not Outcome.COMPLETED:
            return False
        first = result.seconds if result.ttft is None else result.ttft
        return (self.ttft is None or first <= self.ttft) and (
            self.seconds is None or result.seconds <= self.seconds
        )


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The value below which ``percent`` of the values lie, interpolated; ``None`` of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def percentiles(values: Iterable[float | None]) -> dict[str, float | None]:
    """p50, p90 and p99 of the values there are."""
    known = [value for value in values if value is not None]
    return {f"p{percent}": percentile(known, percent) for percent in PERCENTILES}


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one round. Times are seconds; rates are per second of the round.

    Attributes:
        seconds: From the first request's sending to the last one's end.
        sent: Requests sent; the sum of completed, refused and failed.
        completed: Requests whose stream came whole.
        refused: Requests answered 429 or 503.
        failed: All others.
        resent: Requests sent again because the server had closed a kept connection.
        errors: How often each error was met, refusals included.
        tokens: Tokens of the completed answers.
        tokens_from: ``usage`` where the server counted them for every answer, else ``chunks``.
        tokens_per_second: Those tokens over the round's time.
        requests_per_second: Completed requests over the round's time.
        goodput: Completed requests within the target over the round's time.
        good_share: Their share of the requests sent.
        prompt_tokens: Median of the prompts' lengths, where the server reports them.
        ttft: Percentiles of the time to the first piece of text.
        gap: Percentiles of the time between two pieces, over all pieces of all streams.
        worst_gap: Percentiles of each stream's longest gap.
        time_per_token: Percentiles of each stream's mean time for a token after the first.
        latency: Percentiles of the time to the last byte of completed requests.
        refusal: Percentiles of the time to a refusal.
        lag: Percentiles of how late the requests of an open loop were sent.
    """

    seconds: float
    sent: int
    completed: int
    refused: int
    failed: int
    resent: int
    errors: dict[str, int]
    tokens: int
    tokens_from: str
    tokens_per_second: float
    requests_per_second: float
    goodput: float
    good_share: float
    prompt_tokens: float | None
    ttft: dict[str, float | None]
    gap: dict[str, float | None]
    worst_gap: dict[str, float | None]
    time_per_token: dict[str, float | None]
    latency: dict[str, float | None]
    refusal: dict[str, float | None]
    lag: dict[str, float | None] = field(default_factory=dict)


def summarise(results: Sequence[Result], target: LatencyTarget | None = None) -> Summary:
    """The figures of a round.

    Raises:
        ValueError: There are no results.
    """
    if not results:
        raise ValueError("a round without requests has no figures")
    seconds = max(r.ended_at for r in results) - min(r.sent_at for r in results)
    seconds = max(seconds, 1e-9)
    done = [r for r in results if r.outcome is Outcome.COMPLETED]
    refused = [r for r in results if r.outcome is Outcome.REFUSED]
    good = sum(map((target or LatencyTarget()).holds, results))
    tokens = sum(r.tokens for r in done)
    prompts = [r.prompt_tokens for r in done if r.prompt_tokens is not None]
    return Summary(
        seconds=seconds,
        sent=len(results),
        completed=len(done),
        refused=len(refused),
        failed=len(results) - len(done) - len(refused),
        resent=sum(r.resent for r in results),
        errors=dict(Counter(r.error for r in results if r.error is not None)),
        tokens=tokens,
        tokens_from="usage" if all(r.tokens_reported for r in done) else "chunks",
        tokens_per_second=tokens / seconds,
        requests_per_second=len(done) / seconds,
        goodput=good / seconds,
        good_share=good / len(results),
        prompt_tokens=statistics.median(prompts) if prompts else None,
        ttft=percentiles(r.ttft for r in done),
        gap=percentiles(gap for r in done for gap in r.gaps),
        worst_gap=percentiles(max(r.gaps) for r in done if r.gaps),
        time_per_token=percentiles(r.time_per_token for r in done),
        latency=percentiles(r.seconds for r in done),
        refusal=percentiles(r.seconds for r in refused),
        lag=percentiles(r.lag for r in results),
    )


def median_figures(summaries: Sequence[Any]) -> dict[str, Any]:
    """Each figure's median over rounds, in the shape that one round's summary has as JSON.

    Counts of errors are added up instead, and texts are the first round's.
    """
    rounds = [msgspec.to_builtins(summary) for summary in summaries]
    return {name: _middle(name, [r[name] for r in rounds]) for name in rounds[0]}


def _middle(name: str, values: list[Any]) -> Any:
    if name == "errors":
        return dict(sum((Counter(v) for v in values), Counter[str]()))
    if isinstance(values[0], dict):
        return {key: _middle(key, [v[key] for v in values]) for key in values[0]}
    known = [v for v in values if isinstance(v, int | float)]
    if known:
        return statistics.median(known)
    return values[0]
