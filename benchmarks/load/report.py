"""Formats figures as Markdown tables, which are also readable on a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_TIMES = (
    ("TTFT", "ttft"),
    ("gap between pieces", "gap"),
    ("longest gap of a stream", "worst_gap"),
    ("time per token after the first", "time_per_token"),
    ("latency", "latency"),
    ("rejection", "refusal"),
    ("sent too late by", "lag"),
)


def seconds(value: float | None) -> str:
    """A duration with a suitable unit."""
    if value is None:
        return "-"
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:.{1 if value < 0.01 else 0}f} ms" if value < 1 else f"{value:.2f} s"


def number(value: float | None) -> str:
    """A number with three significant digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(x, widths, strict=True)) + " |" for x in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def describe(figures: Mapping[str, Any], *, bounded: bool) -> str:
    """The tables of a round's figures, or of the medians of several rounds.

    Args:
        figures: A summary as a dictionary.
        bounded: Whether a latency target was given; without one goodput is left out.
    """
    counted = "the server's usage" if figures["tokens_from"] == "usage" else "pieces of text"
    rows = [
        ["requests sent", number(figures["sent"])],
        ["completed / rejected / failed", _counts(figures)],
        ["output tokens/s", f"{number(figures['tokens_per_second'])} (counted from {counted})"],
        ["completed requests/s", number(figures["requests_per_second"])],
        ["prompt tokens, median", number(figures["prompt_tokens"])],
    ]
    if bounded:
        share = f"{figures['good_share']:.1%} of those sent"
        rows.append(["goodput, requests/s", f"{number(figures['goodput'])} ({share})"])
    rows += [[f"error: {text}", number(count)] for text, count in figures["errors"].items()]
    times = [
        [label, *(seconds(figures[name][p]) for p in ("p50", "p90", "p99"))]
        for label, name in _TIMES
        if any(figures[name].values())
    ]
    return f"{table(['', 'value'], rows)}\n\n{table(['', 'p50', 'p90', 'p99'], times)}"


def _counts(figures: Mapping[str, Any]) -> str:
    return " / ".join(number(figures[name]) for name in ("completed", "refused", "failed"))
