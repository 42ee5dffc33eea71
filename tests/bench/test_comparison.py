"""The arithmetic of the comparison, its page, and its curve."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.llm.engine.base import GenerationRequest, SamplingParams
from app.llm.engine.echo import EchoBackend
from benchmarks import curve, overload, page, peers, plots
from benchmarks.engine_alone import drive
from benchmarks.goals import Ratio, divide, median_of, ratios
from benchmarks.load.results import Outcome, Result, summarise
from benchmarks.overload import steady_rate
from benchmarks.page import replace_section
from benchmarks.paths import PAGE
from benchmarks.servers import LLAMA, SERVE, StartError, all_rows, ours, start


def figures(*speeds: float, ttft: float = 0.5) -> list[dict[str, Any]]:
    """Rounds of one server."""
    return [{"tokens_per_second": speed, "ttft": {"p50": ttft}, "failed": 0} for speed in speeds]


def measured() -> dict[str, Any]:
    """A small comparison: one engine of ours, one peer, one row that did not start."""
    return {
        "machine": {"processor": "a processor", "peers": ""},
        "rows": ["ours, openvino", "ours, transformers", SERVE],
        "rounds": 3,
        "absent": {"ours, transformers": "it ended: no such engine"},
        "throughput": {
            "ours, openvino": {"1": figures(40, 90, 40), "32": figures(400, ttft=0.3)},
            SERVE: {"1": figures(10, 10, 20), "32": figures(100)},
            "openvino without HTTP": {"32": figures(500, ttft=0.2)},
        },
        "start": {
            "ours, openvino": {"ready": 4.0, "first_answer": 4.1},
            SERVE: {"ready": None, "first_answer": 10.0},
        },
        "memory": {"ours, openvino": {"API": 100.0, "engine": 500.0}},
        "follow_up": {"ours, openvino": {"first_ttft": 1.0, "second_ttft": 0.2}},
        "cache_hit": {"ours, openvino": {"hit": 0.003, "livez": 0.0006}},
        "gap": {"ours, openvino": {"prompt_tokens": 7900, "worst_gap": 0.7}},
    }


def reached(data: dict[str, Any]) -> dict[str, Ratio]:
    """The goals by what they compare."""
    return {ratio.what: ratio for ratio in ratios(data)}


def test_ratios_are_medians_of_the_rounds_own_ratios() -> None:
    """4, 9 and 2 give 4; the medians of both sides, 40 and 10, would hide that it varies."""
    found = reached(measured())[f"tokens/s, openvino ÷ {SERVE}, C = 1"]
    assert (found.value, found.goal, found.verdict) == (4.0, 3.5, "met")


@pytest.mark.parametrize(
    ("what", "value", "verdict"),
    [
        (f"tokens/s, openvino ÷ {SERVE}, C = 32", 4.0, "met"),
        (f"tokens/s, openvino ÷ {SERVE}, C = 8", None, "not measured"),
        (f"tokens/s, openvino ÷ {LLAMA}, C = 1", None, "not measured"),
        ("tokens/s, openvino over HTTP ÷ without HTTP, C = 32", 0.8, "missed"),
        ("TTFT p50, openvino over HTTP ÷ without HTTP, C = 32", 1.5, "missed"),
        ("TTFT, second turn over 1,000 tokens ÷ first turn, openvino", 0.2, "met"),
        ("p50, cache hit ÷ /livez, openvino", 5.0, "missed"),
        (f"start to ready, openvino ÷ start to first answer, {SERVE}", 0.4, "met"),
    ],
)
def test_each_goal_is_judged(what: str, value: float | None, verdict: str) -> None:
    """A ratio that one side is missing for is not measured, and neither met nor missed."""
    found = reached(measured())[what]
    assert found.value == (None if value is None else pytest.approx(value))
    assert found.verdict == verdict


def test_medians_and_divisions_of_what_is_missing() -> None:
    """What was not measured stays unknown through the arithmetic."""
    data = measured()
    assert median_of(data, SERVE, 1, "tokens_per_second") == 10
    assert median_of(data, SERVE, 8, "tokens_per_second") is None
    assert divide(1.0, 0.0) is None
    assert divide(None, 2.0) is None
    assert divide(1.0, 2.0) == 0.5


def test_every_row_is_on_the_page() -> None:
    """What did not start is named with its reason; each section has its text."""
    sections = page.render(measured())
    assert "ours, transformers: not started; it ended: no such engine" in sections["side by side"]
    assert re.search(r"ours, openvino +\| 40 · 500 ms", sections["side by side"])
    assert "API 100, engine 500" in sections["side by side"]
    assert sections["goals"].count("missed") == 3


def test_notes_around_a_section_stay() -> None:
    """Writing a section twice changes only what is between its markers."""
    text = "Above.\n\n<!-- generated: a -->\nold\n<!-- end: a -->\n\nA cause: caches \\1.\n"
    once = replace_section(text, "a", "new \\g<0>")
    assert once == text.replace("\nold\n", "\n\nnew \\g<0>\n\n")
    assert replace_section(once, "a", "new \\g<0>") == once


@pytest.mark.parametrize(
    "text", ["", "<!-- generated: a --> x", "<!-- end: a --> <!-- generated: a -->"]
)
def test_a_page_without_its_markers_is_refused(text: str) -> None:
    """A page that lost a marker is not overwritten."""
    with pytest.raises(ValueError, match="markers of the section a"):
        replace_section(text, "a", "new")


def test_the_page_has_every_section() -> None:
    """docs/performance.md has the markers of all that the benchmarks write."""
    text = PAGE.read_text(encoding="utf-8")
    for name in [*page.render(measured()), "curve"]:
        assert replace_section(text, name, "x") != text


def overload_data(**changed: Any) -> dict[str, Any]:
    """Two rounds of overload; the second one with what is changed."""
    one = {
        "rate": 9.0,
        "peak": 100.0,
        "steady": 96.0,
        "ratio": 0.96,
        "refusal_p99": 0.04,
        "livez_p99": 0.01,
        "lag_share": 1.0,
        "sent": 10,
        "completed": 2,
        "refused": 8,
        "failed": 0,
        "counted": 10.0,
        "counted_completed": 2.0,
        "counted_refused": 8.0,
        "memory": {"API": (100.0, 101.0)},
    }
    return {"factor": 4.0, "duration": 20.0, "rounds": [one, one | changed]}


def curve_data() -> dict[str, Any]:
    """A small curve of one engine, and another one that did not start."""
    one = msgspec.to_builtins(
        summarise([Result(Outcome.COMPLETED, 0.0, 4.0, ttft=1.0, gaps=(1.0, 2.0), prompt_tokens=9)])
    )
    found = {
        "clients": [{"clients": c, "steady": 10.0 * c, **one} for c in (1, 8)],
        "lengths": [{"words": 16, **one}],
        "overload": overload_data(),
    }
    return {"machine": {}, "engines": {"openvino": found}, "absent": {"other": "no such engine"}}


def test_the_curve_is_told_and_judged() -> None:
    """Each load and length is a line; the overload's two goals are judged; absences are named."""
    text = curve.render(curve_data())["curve"]
    assert "other: not started, no such engine" in text
    assert re.search(r"\| 8 +\| 0 +\| 80 ", text)
    assert "missed" not in text


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"ratio": 0.83}, "≥ 0.9"),
        ({"refusal_p99": 0.06}, "≤ 50 ms"),
        ({"livez_p99": 0.3}, "≤ 250 ms"),
        ({"lag_share": 0.98}, "≥ 99 %"),
        ({"failed": 1, "refused": 7}, "as the service counted"),
        ({"counted_completed": 3.0}, "as the service counted"),
        ({"memory": {"API": (100.0, 117.0)}}, "flat"),
    ],
)
def test_an_overload_is_judged(changed: dict[str, Any], missed: str) -> None:
    """Each bound is told apart; of the ratios the median counts, of the others the worst."""
    text = overload.render(overload_data(**changed))
    assert re.findall(r"([^|\s][^|]*): missed", text) == [missed]


def test_plots_are_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both plots are PNG files of a few kilobytes, and equal figures give equal files."""
    monkeypatch.setattr(plots, "PLOTS", tmp_path)
    written = []
    for _ in range(2):
        plots.side_by_side(measured())
        plots.curves(curve_data())
        written.append({p.name: p.read_bytes() for p in tmp_path.iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"side-by-side.png", "curve.png"}
    for picture in written[0].values():
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 100_000


def test_the_steady_rate_counts_what_came_in_the_window() -> None:
    """Pieces inside the window count, with a stream's tokens shared among its pieces."""
    stream = Result(Outcome.COMPLETED, 0.0, 4.0, ttft=1.0, gaps=(1.0, 1.0, 1.0), tokens=8)
    refused = Result(Outcome.REFUSED, 0.0, 4.0)
    assert steady_rate([stream, refused], 1.5, 3.5) == pytest.approx(2 * 2 / 2)


def test_the_engine_alone_runs_every_request() -> None:
    """Driven without HTTP, each request is generated once, and so many run at a time."""
    most = 0

    class Watched(EchoBackend):
        def step(self) -> Any:
            nonlocal most
            most = max(most, self.stats().running)
            return super().step()

    backend = Watched()
    requests = [GenerationRequest(str(i), [65, 66, 67], 3, SamplingParams()) for i in range(10)]
    found = drive(backend, requests, 4)
    assert (found["tokens"], len(found["ttft"]), most) == (30, 10, 4)


async def test_a_row_that_does_not_start_says_why() -> None:
    """A configuration that this version refuses is an error of one line, not a hang."""
    with pytest.raises(StartError, match=r"configuration error: model\.engine"):
        await start(ours("transformers", MODEL__ENGINE="nonesuch"))


def test_rows_fit_the_device() -> None:
    """On a GPU there are the transformers engine and transformers serve, nothing built for CPUs."""
    assert [row.name for row in all_rows("cuda")] == ["ours, transformers", SERVE]
    assert [row.name for row in all_rows("cpu", ["openvino"])] == ["ours, openvino", SERVE, LLAMA]


def test_servers_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU ours and the peer run there, and neither takes the memory that the other needs."""
    monkeypatch.setattr(peers, "_environment", lambda *_, **__: Path("python"))
    monkeypatch.setattr(peers, "MODEL", tmp_path)
    (tmp_path / "model.safetensors").touch()
    mine, peer = all_rows("cuda")
    assert mine.environment["MODEL__DEVICE"] == "cuda"
    assert mine.environment["MODEL__CUDA_MEMORY_SHARE"] == "0.25"
    command = list(peer.command(8001))
    assert command[command.index("--device") + 1] == "cuda"
    assert command[command.index("--cb-max-memory-percent") + 1] == "0.25"
    assert "MODEL__CUDA_MEMORY_SHARE" not in ours("transformers").environment
