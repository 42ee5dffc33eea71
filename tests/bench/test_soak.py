"""The soak test, and its judgement of leaks."""

import pytest

from benchmarks import vitals
from benchmarks.load.targets import Route, Target
from benchmarks.soak import SETTINGS, Report, Tally, slope, soak
from tests.support.service import API_KEY, running_service


async def test_a_soaked_service_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All kinds of requests get the expected answers and leak nothing."""
    monkeypatch.setattr("benchmarks.soak.STILL_SECONDS", 1.0)
    with running_service(interpreter="new", LOGGING__LEVEL="ERROR", **SETTINGS) as service:
        target = Target(service.base_url, Route.CHAT, API_KEY)
        report = await soak(target, service.process.pid, seconds=2, warm_up=1, clients=8)
        assert report.problems() == []
        assert service.raw_log().count('"ERROR"') == 0
    assert set(report.tally.requests) == {
        *("stream", "whole", "turn of a session", "repeated", "personal data", "left", "mistake")
    }
    assert report.end["sessions"] == report.end["running"] == 0
    assert report.memory.keys() == {"API", "engine"}


def a_report(**changed: float) -> Report:
    """A run without problems but for the counts that ``changed`` at its end."""
    start = {"tasks": 3.0, "API: files": 20.0}
    steady = [(float(at), 100.0) for at in range(40)]
    return Report(Tally(), 40.0, start, start | changed, {"API": steady})


def test_leaks_are_problems() -> None:
    """A leaked file, an unexpected answer and growing memory are each reported."""
    assert a_report().problems() == []
    leaky = a_report(**{"API: files": 21.0})
    leaky.tally.surprises["stream, chat: boom"] += 2
    leaky = Report(leaky.tally, 40.0, leaky.start, leaky.end, {"engine": _growing(1.0)})
    assert leaky.problems() == [
        "2 times: stream, chat: boom",
        "API: files: 20.0 before, 21.0 after",
        "engine: grew from 114 to 134 MiB",
    ]


def test_only_more_threads_than_asyncios_pool_has_are_a_leak() -> None:
    """The pool of an API process starts its threads late; an engine has none of it."""
    before = {"API: threads": 9.0, "engine: threads": 9.0}
    assert vitals.leaks(before, before | {"API: threads": 10.0}) == []
    assert vitals.leaks(before, {"API: threads": 100.0, "engine: threads": 10.0}) == [
        "API: threads: 9.0 before, 100.0 after",
        "engine: threads: 9.0 before, 10.0 after",
    ]
    assert vitals.leaks(before, {"API: threads": 9.0}) == ["engine: threads: 9.0 before, 0 after"]


def test_memory_may_rise_a_little() -> None:
    """Growth under 16 MiB is no problem, and the slope is in MiB an hour."""
    assert Report(Tally(), 40.0, {}, {}, {"API": _growing(0.5)}).problems() == []
    assert slope(_growing(0.5)) == pytest.approx(1800)
    assert slope([(0.0, 1.0)]) == 0.0


def _growing(mib: float) -> list[tuple[float, float]]:
    return [(float(at), 100 + mib * at) for at in range(40)]
