"""What the watchdog reports about processes; real processes where it asks the kernel."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.llm.client.watchdog import LOOK_SECONDS, STALLED_LOOKS, Activity, Duty, Watchdog, observe

BUSY = "while True: pass"
IDLE = "import sys; print(flush=True); sys.stdin.read()"
BUSY_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY!r}])"

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="the kernel does not say what a process does"
)


def looks(number: int, duty: Duty, activity: Activity | None) -> str | None:
    """What a new watchdog reports after a first look and this many more that see the same."""
    watchdog = Watchdog(60)
    for _ in range(number):
        assert watchdog.look(duty, activity) is None
    return watchdog.look(duty, activity)


def still(state: str = "S") -> Activity:
    """A process that does nothing."""
    return Activity(state, ticks=100, reads=1000)


@pytest.fixture
def idle() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that waits."""
    with subprocess.Popen(
        [sys.executable, "-c", IDLE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


@pytest.mark.parametrize("program", [BUSY, BUSY_CHILD])
def test_a_process_that_computes_makes_progress(program: str) -> None:
    """So does one whose child computes, as while a child reads the tokenizer."""
    with subprocess.Popen([sys.executable, "-c", program], start_new_session=True) as process:
        try:
            first = observe(process.pid)
            assert first is not None
            deadline = time.monotonic() + 30
            while (seen := observe(process.pid)) is None or seen.ticks < first.ticks + 50:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


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
    assert "stopped for 3 s" in str(looks(STALLED_LOOKS, Duty.NOTHING, seen))


def test_a_process_that_is_gone_is_no_stall(idle: "subprocess.Popen[bytes]") -> None:
    """The end of a process is noticed by its socket."""
    idle.kill()
    idle.wait()
    assert observe(idle.pid) is None
    assert looks(100, Duty.LOADING, None) is None


@pytest.mark.parametrize("duty", [Duty.LOADING, Duty.GENERATING])
def test_no_progress_with_work_is_a_stall(duty: Duty) -> None:
    """The report says what the process should have been doing."""
    assert f"{duty}, it has used no processor" in str(looks(STALLED_LOOKS, duty, still()))


@pytest.mark.parametrize("duty", [Duty.NOTHING, Duty.FETCHING])
def test_no_progress_without_work_is_no_stall(duty: Duty) -> None:
    """An idle engine waits for requests, a download for the network."""
    assert looks(1000, duty, still()) is None


@pytest.mark.parametrize("state", ["D", "t"])
def test_waiting_for_a_disk_or_a_debugger_is_no_stall(state: str) -> None:
    """No signal would end the first, and a debugger stops a process on purpose."""
    assert looks(100, Duty.LOADING, still(state)) is None


@pytest.mark.parametrize("more", [Activity("S", 2, 0), Activity("S", 0, 1)])
def test_processor_time_and_reads_are_progress(more: Activity) -> None:
    """Either resets the count of looks."""
    watchdog = Watchdog(60)
    for i in range(100):
        seen = Activity("S", 100 + i // 4 * more.ticks, i // 4 * more.reads)
        assert watchdog.look(Duty.LOADING, seen) is None


def test_looks_before_a_request_or_a_report_do_not_count() -> None:
    """A request after an hour without one does not find a stall."""
    watchdog = Watchdog(60)
    for _ in range(100):
        assert watchdog.look(Duty.NOTHING, still()) is None
    for _ in range(STALLED_LOOKS - 1):
        assert watchdog.look(Duty.GENERATING, still()) is None
    watchdog.heard()
    for _ in range(STALLED_LOOKS - 1):
        assert watchdog.look(Duty.GENERATING, still()) is None


def test_a_step_may_take_engine_step_timeout_seconds_and_no_longer() -> None:
    """However busy the process is, and where the kernel tells nothing."""
    watchdog = Watchdog(10)
    for i in range(int(10 / LOOK_SECONDS)):
        assert watchdog.look(Duty.GENERATING, Activity("R", 100 * i, 0)) is None
    assert watchdog.look(Duty.GENERATING, None) == "one step has taken more than 10 s"
