"""Writes the generated sections of docs/performance.md, between their markers."""

import re
from typing import Any

from benchmarks import machine
from benchmarks.goals import CLIENTS, median_of, ratios
from benchmarks.load.report import number, seconds, table
from benchmarks.paths import PAGE


def replace_section(text: str, name: str, body: str) -> str:
    """``text`` with the text between a section's markers replaced by ``body``.

    Raises:
        ValueError: ``text`` does not have the markers exactly once.
    """
    begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1 or text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{PAGE.name} must have the markers of the section {name} exactly once")
    return pattern.sub(lambda _: f"{begin}\n\n{body}\n\n{end}", text)


def write(sections: dict[str, str]) -> None:
    """Replace sections of the page, by name; their tables lose the padding for terminals."""
    text = PAGE.read_text(encoding="utf-8")
    for name, body in sections.items():
        compact = re.sub(r"\|-+(?=\|)", "|---", re.sub(r" *\| *", "|", body))
        text = replace_section(text, name, compact)
    PAGE.write_text(text, encoding="utf-8")


def _speed(data: dict[str, Any]) -> str:
    header = ["", *(f"C = {c}: tokens/s · TTFT p50" for c in CLIENTS), "failed"]
    lines = []
    for name in data["throughput"]:
        cells = [
            f"{number(median_of(data, name, c, 'tokens_per_second'))} · "
            f"{seconds(median_of(data, name, c, 'ttft', 'p50'))}"
            for c in CLIENTS
        ]
        rounds = data["throughput"][name].values()
        bad = sum(f.get("failed", 0) + f.get("refused", 0) for found in rounds for f in found)
        lines.append([name, *cells, str(bad)])
    absent = [f"- {name}: not started; {reason}" for name, reason in data["absent"].items()]
    return "\n\n".join(filter(None, [table(header, lines), "\n".join(absent)]))


def _others(data: dict[str, Any]) -> str:
    header = [
        "",
        "start to ready · to first answer",
        "resident memory, MiB",
        "first turn · follow-up TTFT",
        "cache hit · /livez p50",
        "worst gap beside a long prompt",
    ]
    lines = []
    for name in data["start"]:
        start, gap = data["start"][name], data["gap"].get(name, {})
        memory = ", ".join(f"{k} {v:,.0f}" for k, v in data["memory"].get(name, {}).items())
        follow, cache = data["follow_up"].get(name, {}), data["cache_hit"].get(name, {})
        length = number(gap.get("prompt_tokens"))
        lines.append(
            [
                name,
                f"{seconds(start['ready'])} · {seconds(start['first_answer'])}",
                memory,
                f"{seconds(follow.get('first_ttft'))} · {seconds(follow.get('second_ttft'))}",
                f"{seconds(cache.get('hit'))} · {seconds(cache.get('livez'))}",
                f"{seconds(gap.get('worst_gap'))} ({length} tokens)",
            ]
        )
    faults = [f"- {fault}" for fault in data.get("faults", [])]
    faults += [
        f"- {name}, beside a long prompt: {error}"
        for name, gap in data["gap"].items()
        for error in gap.get("errors", [])
    ]
    return "\n\n".join(filter(None, [table(header, lines), "\n".join(faults)]))


def goals(data: dict[str, Any]) -> str:
    """The table of goals."""
    lines = [
        [
            ratio.what,
            f"{'≥' if ratio.at_least else '≤'} {ratio.goal:g}",
            "-" if ratio.value is None else f"{ratio.value:.2f}",
            ratio.verdict,
        ]
        for ratio in ratios(data)
    ]
    return table(["ratio", "goal", "reached", ""], lines)


def side_by_side(data: dict[str, Any]) -> str:
    """The tables of figures."""
    rounds = f"Medians of {data['rounds']} starts and rounds, the servers in turns in each."
    return f"{rounds}\n\n{_speed(data)}\n\n{_others(data)}"


def render(data: dict[str, Any]) -> dict[str, str]:
    """The sections that ``python -m benchmarks table`` writes."""
    return {
        "machine": machine.lines(data["machine"]),
        "goals": goals(data),
        "side by side": side_by_side(data),
    }
