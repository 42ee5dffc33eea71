"""Plots of the figures: docs/performance/*.png."""

from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.goals import CLIENTS, median_of
from benchmarks.paths import PLOTS

mpl.use("agg")
_SIZE = (6.4, 3.6)


def _save(figure: Figure, name: str) -> None:
    PLOTS.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    # Without a date or a version, equal figures give equal files.
    figure.savefig(PLOTS / name, dpi=100, metadata={"Software": None})


def side_by_side(data: dict[str, Any]) -> None:
    """Tokens/s by server and number of clients, as bars."""
    names = list(data["throughput"])
    figure = Figure(figsize=_SIZE)
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        heights = [median_of(data, name, c, "tokens_per_second") or 0.0 for c in CLIENTS]
        axes.bar([x + place * width for x in range(len(CLIENTS))], heights, width, label=name)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(CLIENTS))])
    axes.set_xticklabels([f"{c} clients" for c in CLIENTS])
    axes.set_ylabel("tokens/s")
    axes.legend(fontsize=7)
    _save(figure, "side-by-side.png")


def curves(data: dict[str, Any]) -> None:
    """Throughput and TTFT by number of clients, and TTFT by length of the prompt."""
    figure = Figure(figsize=(9.6, 3.2))
    speed, first, length = figure.subplots(1, 3)
    for engine, found in data["engines"].items():
        clients = [f["clients"] for f in found["clients"]]
        speed.plot(clients, [f["steady"] for f in found["clients"]], "o-", label=engine)
        for percent, style in (("p50", "o-"), ("p99", "o:")):
            values = [f["ttft"][percent] for f in found["clients"]]
            first.plot(clients, values, style, label=f"{engine}, {percent}")
        tokens = [f["prompt_tokens"] for f in found["lengths"]]
        length.plot(tokens, [f["ttft"]["p50"] for f in found["lengths"]], "o-", label=engine)
    for axes, x, y in (
        (speed, "clients", "tokens/s"),
        (first, "clients", "TTFT, s"),
        (length, "prompt tokens", "TTFT, s"),
    ):
        axes.set(xscale="log", xlabel=x, ylabel=y)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=7)
    _save(figure, "curve.png")
