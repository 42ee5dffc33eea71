"""The goals of the comparison: ratios of the service's figures to other servers' figures."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.servers import LLAMA, SERVE

CLIENTS = (1, 8, 32)
GPU_CLIENTS = (1, 8, 64, 256)


@dataclass(frozen=True)
class Ratio:
    """A line of the table of goals.

    Attributes:
        at_least: Whether ``goal`` is a lower bound; else it is an upper bound.
        value: The ratio; ``None`` when a side was not measured.
    """

    what: str
    goal: float
    at_least: bool
    value: float | None

    @property
    def verdict(self) -> str:
        """``met``, ``missed`` or ``not measured``."""
        if self.value is None:
            return "not measured"
        met = self.value >= self.goal if self.at_least else self.value <= self.goal
        return "met" if met else "missed"

    @property
    def judged(self) -> str:
        """The ratio, its goal and the verdict, for the cell of a table."""
        value = "-" if self.value is None else f"{self.value:.2f}"
        return f"{value} ({'≥' if self.at_least else '≤'}{self.goal:g}: {self.verdict})"


def median_of(data: dict[str, Any], name: str, clients: int, *path: str) -> float | None:
    """The median of a row's figure over rounds; ``None`` when it was not measured."""
    rounds = data["throughput"].get(name, {}).get(str(clients), [])
    values = []
    for figures in rounds:
        value: Any = figures
        for key in path:
            value = value.get(key) if value is not None else None
        if value is not None:
            values.append(float(value))
    return statistics.median(values) if values else None


def divide(numerator: float | None, denominator: float | None) -> float | None:
    """A ratio; ``None`` when a side is missing or the denominator is 0."""
    return None if numerator is None or not denominator else numerator / denominator


def speed_ratio(data: dict[str, Any], ours: str, peer: str, clients: int) -> float | None:
    """The median of the ratios of single rounds, in which changes between rounds cancel out."""
    mine = data["throughput"].get(ours, {}).get(str(clients), [])
    theirs = data["throughput"].get(peer, {}).get(str(clients), [])
    ratios = [
        ratio
        for a, b in zip(mine, theirs, strict=False)
        if (ratio := divide(a["tokens_per_second"], b["tokens_per_second"])) is not None
    ]
    return statistics.median(ratios) if ratios else None


def _speed_goals(data: dict[str, Any]) -> list[Ratio]:
    wanted: list[tuple[str, str, Sequence[float]]] = [
        ("openvino", SERVE, (3.5, 3.0, 3.5)),
        ("openvino", LLAMA, (1.0, 2.2, 2.8)),
        ("transformers", SERVE, (1.3, 1.3, 1.3)),
    ]
    return [
        Ratio(
            f"tokens/s, {engine} ÷ {peer}, C = {clients}",
            goal,
            at_least=True,
            value=speed_ratio(data, f"ours, {engine}", peer, clients),
        )
        for engine, peer, goals in wanted
        for clients, goal in zip(CLIENTS, goals, strict=True)
    ]


def _http_goals(data: dict[str, Any], engine: str) -> list[Ratio]:
    name, alone = f"ours, {engine}", f"{engine} without HTTP"
    first = [median_of(data, row, 32, "ttft", "p50") for row in (name, alone)]
    follow = data["follow_up"].get(name, {})
    cache = data["cache_hit"].get(name, {})
    return [
        Ratio(
            f"tokens/s, {engine} over HTTP ÷ without HTTP, C = 32",
            0.95,
            at_least=True,
            value=speed_ratio(data, name, alone, 32),
        ),
        Ratio(
            f"TTFT p50, {engine} over HTTP ÷ without HTTP, C = 32",
            1.3,
            at_least=False,
            value=divide(*first),
        ),
        Ratio(
            f"TTFT, second turn over 1,000 tokens ÷ first turn, {engine}",
            0.25,
            at_least=False,
            value=divide(follow.get("second_ttft"), follow.get("first_ttft")),
        ),
        Ratio(
            f"p50, cache hit ÷ /livez, {engine}",
            3.0,
            at_least=False,
            value=divide(cache.get("hit"), cache.get("livez")),
        ),
    ]


def ratios(data: dict[str, Any]) -> list[Ratio]:
    """All goals with the ratios that were reached."""
    engines = [name.removeprefix("ours, ") for name in data["rows"] if name.startswith("ours, ")]
    start = data["start"]
    found = _speed_goals(data)
    for engine in engines:
        found += _http_goals(data, engine)
    ready = start.get("ours, openvino", {}).get("ready")
    answer = start.get(SERVE, {}).get("first_answer")
    found.append(
        Ratio(
            f"start to ready, openvino ÷ start to first answer, {SERVE}",
            0.5,
            at_least=False,
            value=divide(ready, answer),
        )
    )
    return found
