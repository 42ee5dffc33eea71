"""The arithmetic of the comparison and of the overload."""

import re
from typing import Any

import pytest

from app.llm.engine.echo import EchoBackend
from app.llm.protocol import GenerationRequest, SamplingParams
from benchmarks import large, overload
from benchmarks.engine_alone import drive
from benchmarks.goals import Ratio, ratios
from benchmarks.load.results import Outcome, Result
from benchmarks.overload import steady_rate
from benchmarks.page import replace_section
from benchmarks.paths import PAGE
from benchmarks.servers import LLAMA, SERVE


def figures(*speeds: float, ttft: float = 0.5) -> list[dict[str, Any]]:
    """Rounds of one server."""
    return [{"tokens_per_second": speed, "ttft": {"p50": ttft}} for speed in speeds]


def measured() -> dict[str, Any]:
    """A comparison of an engine with a peer."""
    return {
        "rows": ["ours, openvino", SERVE],
        "throughput": {
            "ours, openvino": {"1": figures(40, 90, 40), "32": figures(400, ttft=0.3)},
            SERVE: {"1": figures(10, 10, 20), "32": figures(100)},
            "openvino without HTTP": {"32": figures(500, ttft=0.2)},
        },
        "start": {"ours, openvino": {"ready": 4.0}, SERVE: {"first_answer": 10.0}},
        "follow_up": {"ours, openvino": {"first_ttft": 1.0, "second_ttft": 0.2}},
        "cache_hit": {"ours, openvino": {"hit": 0.003, "livez": 0.0006}},
    }


def reached(data: dict[str, Any]) -> dict[str, Ratio]:
    """The goals by description."""
    return {ratio.what: ratio for ratio in ratios(data)}


def test_a_ratio_is_the_median_over_rounds() -> None:
    """The ratios 4, 9 and 2 of single rounds give 4, not the ratio of the medians."""
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
    """A ratio is met, missed, or not measured when a side is missing."""
    found = reached(measured())[what]
    assert found.value == (None if value is None else pytest.approx(value))
    assert found.verdict == verdict


def test_a_large_model_is_compared_with_the_same_bits() -> None:
    """Each of our rows is divided by the peer of its bits, by medians; what is missing is told."""
    keys = ["memory", "ready", "long", *(f"speed {c}" for c in large.CLIENTS)]
    rounds = [dict.fromkeys(keys, value) for value in (4.0, 6.0, 20.0)]
    half = [dict.fromkeys(keys, 3.0)]
    found = {large.DEFAULT: rounds, large.INT4: half, large.LLAMA_8: half, large.LLAMA_4: []}
    data = {"machine": {}, "rounds": 3, "found": found, "absent": {large.LLAMA_4: "no compiler"}}
    compared = large.ratios(data, large.DEFAULT, large.LLAMA_8)
    assert compared["tokens/s, C = 8"].judged == "2.00 (≥3: missed)"
    assert compared["resident"].judged == "2.00 (≤1.2: missed)"
    missing = large.ratios(data, large.INT4, large.LLAMA_4)
    assert missing["tokens/s, C = 1"].judged == "- (≥1.2: not measured)"
    text = large.render(data)["large model"]
    assert re.search(r"\| ours, by default +\| 6 · -", text)
    assert "- llama-server, Q4_0: not started; no compiler" in text


def test_the_page_has_every_section() -> None:
    """docs/performance.md has the markers of each section that the benchmarks write, once."""
    text = PAGE.read_text(encoding="utf-8")
    for name in ("large model", "machine", "goals", "side by side", "curve"):
        assert replace_section(text, name, "new figures") != text


def overload_data(**changed: Any) -> dict[str, Any]:
    """Two rounds of overload; ``changed`` applies to the second one."""
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


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"ratio": 0.83}, "≥ 0.90"),
        ({"refusal_p99": 0.06}, "≤ 50 ms"),
        ({"livez_p99": 0.3}, "≤ 250 ms"),
        ({"lag_share": 0.98}, "≥ 99 %"),
        ({"failed": 1, "refused": 7}, "as the service counted"),
        ({"counted_completed": 3.0}, "as the service counted"),
        ({"memory": {"API": (100.0, 117.0)}}, "flat"),
    ],
)
def test_an_overload_is_judged(changed: dict[str, Any], missed: str) -> None:
    """Each bound is judged alone: the ratios by their median, the other figures by the worst."""
    text = overload.render(overload_data(**changed))
    assert re.findall(r"([^|\s][^|]*): missed", text) == [missed]


def test_the_steady_rate_counts_pieces_in_the_window() -> None:
    """Pieces inside the window count, each as an equal share of its stream's tokens."""
    stream = Result(Outcome.COMPLETED, 0.0, 4.0, ttft=1.0, gaps=(1.0, 1.0, 1.0), tokens=8)
    refused = Result(Outcome.REFUSED, 0.0, 4.0)
    assert steady_rate([stream, refused], 1.5, 3.5) == pytest.approx(2 * 2 / 2)


def test_the_engine_alone_runs_every_request() -> None:
    """Driven without HTTP, each request is generated once, and at most four run at a time."""
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
