"""What the watchdog reports about processes; real processes where it asks the kernel."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.config.engine import EngineSettings
from app.llm.client.watchdog import LOOK_SECONDS, Activity, Duty, Watchdog, observe
from tests.support.programs import BUSY, PINNED, STARVED, running, with_child

IDLE = "import sys; print(flush=True); sys.stdin.read()"
# The least that is allowed.
SETTINGS = EngineSettings(step_timeout_seconds=60, stall_timeout_seconds=1)
STALLED_LOOKS = int(SETTINGS.stall_timeout_seconds / LOOK_SECONDS)

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="the kernel does not say what a process does"
)


def looks(number: int, duty: Duty, activity: Activity | None) -> str | None:
    """What a new watchdog reports after a first look and this many more that see the same."""
    watchdog = Watchdog(SETTINGS)
    for _ in range(number):
        assert watchdog.look(duty, activity) is None
    return watchdog.look(duty, activity)


def still(*states: str) -> Activity:
    """A process whose main thread sleeps and whose other threads have these states."""
    return Activity("S", frozenset(("S", *states)), milliseconds=100, reads=1000)


@pytest.fixture
def idle() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that waits."""
    with running(IDLE) as process:
        yield process


@pytest.mark.parametrize("program", [BUSY, with_child(BUSY)])
def test_a_process_that_computes_makes_progress(program: str) -> None:
    """So does one whose child computes, as while a child reads the tokenizer."""
    with running(program) as process:
        first = observe(process.pid)
        assert first is not None
        deadline = time.monotonic() + 30
        while (seen := observe(process.pid)) is None or (
            seen.milliseconds < first.milliseconds + 500
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_process_that_a_busy_host_starves_is_no_stall() -> None:
    """Nor is one that waits for a starved child, for three times as long as a stall takes."""
    with (
        running(PINNED + BUSY),
        running(STARVED + BUSY) as starved,
        running(with_child(STARVED + BUSY)) as parent,
    ):
        watchdogs = {process.pid: Watchdog(SETTINGS) for process in (starved, parent)}
        for _ in range(3 * STALLED_LOOKS):
            # The watchdog counts looks, whatever time is between them.
            time.sleep(LOOK_SECONDS / 3)
            for pid, watchdog in watchdogs.items():
                assert watchdog.look(Duty.LOADING, observe(pid)) is None
        last = [observe(pid) for pid in watchdogs]
    states = [(one.state, "R" in one.states) for one in last if one is not None]
    assert states == [("R", True), ("S", True)]


def test_a_process_that_waits_makes_no_progress(idle: "subprocess.Popen[bytes]") -> None:
    """The kernel counts nothing for it."""
    while (first := observe(idle.pid)) is None or first.state != "S":
        time.sleep(0.01)
    time.sleep(0.2)
    assert observe(idle.pid) == first


def test_a_stopped_process_is_a_stall(idle: "subprocess.Popen[bytes]") -> None:
    """The kernel's state of the process says so, also while it has no work."""
    idle.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, idle.pid, os.WSTOPPED | os.WNOWAIT)
    seen = observe(idle.pid)
    assert seen is not None
    assert "stopped for 1 s" in str(looks(STALLED_LOOKS, Duty.NOTHING, seen))


def test_a_process_that_is_gone_is_no_stall(idle: "subprocess.Popen[bytes]") -> None:
    """The end of a process is noticed by its socket."""
    idle.kill()
    idle.wait()
    assert observe(idle.pid) is None
    assert looks(100, Duty.LOADING, None) is None


@pytest.mark.parametrize("duty", [Duty.LOADING, Duty.GENERATING])
def test_no_progress_with_work_is_a_stall(duty: Duty) -> None:
    """The report says what the process should have been doing."""
    assert f"{duty}, it has not used or awaited a processor" in str(
        looks(STALLED_LOOKS, duty, still())
    )


@pytest.mark.parametrize("duty", [Duty.NOTHING, Duty.FETCHING])
def test_no_progress_without_work_is_no_stall(duty: Duty) -> None:
    """An idle engine waits for requests, a download for the network."""
    assert looks(1000, duty, still()) is None


@pytest.mark.parametrize("state", ["R", "D", "t"])
def test_a_thread_that_waits_for_a_processor_a_disk_or_a_debugger_is_no_stall(state: str) -> None:
    """Also where the kernel counts no waits; a debugger stops a process on purpose."""
    assert looks(100, Duty.LOADING, still(state)) is None


@pytest.mark.parametrize(("milliseconds", "reads"), [(20, 0), (0, 1)])
def test_processor_time_and_reads_are_progress(milliseconds: int, reads: int) -> None:
    """Either resets the count of looks."""
    watchdog = Watchdog(SETTINGS)
    for i in range(100):
        moves = i // STALLED_LOOKS
        seen = Activity("S", frozenset("S"), moves * milliseconds, moves * reads)
        assert watchdog.look(Duty.LOADING, seen) is None


def test_waking_now_and_then_is_no_progress() -> None:
    """A thread that polls in a hung process does not hide that, however long a stall may take."""
    watchdog = Watchdog(EngineSettings(stall_timeout_seconds=60))
    found = [
        watchdog.look(Duty.LOADING, Activity("S", frozenset("S"), 10 * i, 0))
        for i in range(int(60 / LOOK_SECONDS) + 1)
    ]
    assert [*map(bool, found)] == [False] * (len(found) - 1) + [True]


def test_looks_before_a_request_or_a_report_do_not_count() -> None:
    """A request after an hour without one does not find a stall."""
    watchdog = Watchdog(SETTINGS)
    for _ in range(100):
        assert watchdog.look(Duty.NOTHING, still()) is None
    for _ in range(STALLED_LOOKS - 1):
        assert watchdog.look(Duty.GENERATING, still()) is None
    watchdog.heard()
    for _ in range(STALLED_LOOKS - 1):
        assert watchdog.look(Duty.GENERATING, still()) is None


def test_a_step_may_take_engine_step_timeout_seconds_and_no_longer() -> None:
    """However busy the process is, and where the kernel tells nothing."""
    watchdog = Watchdog(EngineSettings(step_timeout_seconds=10))
    for i in range(int(10 / LOOK_SECONDS)):
        assert watchdog.look(Duty.GENERATING, Activity("R", frozenset("R"), 500 * i, 0)) is None
    assert watchdog.look(Duty.GENERATING, None) == "one step has taken more than 10 s"
