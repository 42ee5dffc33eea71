"""The outcome of each request, and the figures of a round."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate, pairwise
from typing import Any

import msgspec

from benchmarks.load.targets import Stream, error_text, read_stream
from benchmarks.load.transport import Exchange

REFUSALS = (429, 503)
PERCENTILES = (50, 90, 99)


class Outcome(StrEnum):
    """How a request ended; refused is 429 or 503."""

    COMPLETED = "completed"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one request. Durations are seconds after it was sent.

    Attributes:
        sent_at: By ``time.perf_counter``.
        seconds: Until the last byte or the failure.
        lag: Delay of the sending against the plan of an open loop.
        ttft: Until the first piece of text.
        gaps: Between consecutive pieces of text.
        tokens: Tokens of the answer by the server's count, else the number of pieces of text.
        tokens_reported: Whether ``tokens`` is the server's count.
        resent: Whether it was sent again because the server had closed a kept connection.
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
        """When it ended, by ``time.perf_counter``."""
        return self.sent_at + self.seconds

    @property
    def text_at(self) -> list[float]:
        """When each piece of text arrived."""
        if self.ttft is None:
            return []
        return [*accumulate(self.gaps, initial=self.sent_at + self.ttft)]

    @property
    def time_per_token(self) -> float | None:
        """Mean seconds of a token after the first (TPOT)."""
        if self.ttft is None or self.tokens < 2:
            return None
        return sum(self.gaps) / (self.tokens - 1)


def result_of(exchange: Exchange) -> Result:
    """The result of an exchange."""
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
    """Most seconds until the first text and until the last byte of a good request."""

    ttft: float | None = None
    seconds: float | None = None

    def holds(self, result: Result) -> bool:
        """Whether a request was completed within the bounds."""
        if result.outcome is not Outcome.COMPLETED:
            return False
        first = result.seconds if result.ttft is None else result.ttft
        return (self.ttft is None or first <= self.ttft) and (
            self.seconds is None or result.seconds <= self.seconds
        )


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The percentile by linear interpolation; ``None`` without values."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def percentiles(values: Iterable[float | None]) -> dict[str, float | None]:
    """p50, p90 and p99 of the values that are not ``None``."""
    known = [value for value in values if value is not None]
    return {f"p{percent}": percentile(known, percent) for percent in PERCENTILES}


def summarise(results: Sequence[Result], target: LatencyTarget | None = None) -> dict[str, Any]:
    """The figures of a round. Times are seconds; rates are per second of the round.

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
    return {
        # From the sending of the first request to the end of the last.
        "seconds": seconds,
        "sent": len(results),
        "completed": len(done),
        "refused": len(refused),
        "failed": len(results) - len(done) - len(refused),
        # Sent again, because the server had closed a kept connection.
        "resent": sum(r.resent for r in results),
        # The number of each error, including rejections.
        "errors": dict(Counter(r.error for r in results if r.error is not None)),
        # Of the completed answers, by the server's count where all have it.
        "tokens": tokens,
        "tokens_from": "usage" if all(r.tokens_reported for r in done) else "chunks",
        "tokens_per_second": tokens / seconds,
        "requests_per_second": len(done) / seconds,
        # Completed requests within the target, and their share of those sent.
        "goodput": good / seconds,
        "good_share": good / len(results),
        "prompt_tokens": statistics.median(prompts) if prompts else None,
        "ttft": percentiles(r.ttft for r in done),
        # Between consecutive pieces of all streams, and the longest of each stream.
        "gap": percentiles(gap for r in done for gap in r.gaps),
        "worst_gap": percentiles(max(r.gaps) for r in done if r.gaps),
        "time_per_token": percentiles(r.time_per_token for r in done),
        "latency": percentiles(r.seconds for r in done),
        "refusal": percentiles(r.seconds for r in refused),
        "lag": percentiles(r.lag for r in results),
    }


def median_figures(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over rounds.

    Counts of errors are added up instead, and texts are those of the first round.
    """
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
