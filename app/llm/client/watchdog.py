"""Detects an engine process that makes no progress: stopped, deadlocked, or lost in a step.

The kernel counts processor time and reads of every process, so the engine needs no code of its own
for this: docs/adr/0016. A process that waits for a processor makes progress, since a busy host is
no fault of its own. Time is counted in looks, not in seconds. When the machine sleeps, the
container is paused or the event loop is late, there are fewer looks, and no false alarm.
"""

import contextlib
import math
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from app.core.config.engine import EngineSettings

LOOK_SECONDS = 0.5
"""Time between two looks."""

# Between two looks. A process whose threads only wake and sleep again uses less.
_LEAST_MILLISECONDS = 20
_TICK_MILLISECONDS = 1000 // os.sysconf("SC_CLK_TCK")
# R runs or waits for a processor: the kernel counts a wait only when it is over. D waits for a
# disk, where no signal would end the process; t is held by a debugger on purpose.
_MOVING_STATES = frozenset("RDt")
_STOPPED = "T"


class Duty(StrEnum):
    """What the engine process is expected to do."""

    NOTHING = "nothing"
    FETCHING = "fetching the model"
    LOADING = "loading the model"
    GENERATING = "generating"


@dataclass(frozen=True, slots=True)
class Activity:
    """What the kernel has counted of a process and its children.

    Attributes:
        state: The state of the process' main thread, as a letter of proc(5).
        states: The states of all threads, the children's too.
        milliseconds: Time that threads have run, or have waited for a processor.
        reads: Bytes read plus pages faulted in from disk; only its changes mean anything.
    """

    state: str
    states: frozenset[str]
    milliseconds: int
    reads: int


def observe(pid: int) -> Activity | None:
    """Read what the kernel has counted; ``None`` where that is unknown, as outside Linux."""
    own = _read(pid)
    if own is None:
        return None
    family = [own, *filter(None, map(_read, _children(pid)))]
    return Activity(
        own.state,
        frozenset[str]().union(*(one.states for one in family)),
        sum(one.milliseconds for one in family),
        sum(one.reads for one in family),
    )


def _read(pid: int) -> Activity | None:
    folder = Path("/proc") / str(pid)
    try:
        fields = _stat(folder)
        threads = [*(folder / "task").iterdir()]
    except OSError:
        return None
    page_faults, user, system = map(int, (fields[9], *fields[11:13]))
    try:
        read = int((folder / "io").read_text().split()[1])
    except OSError:
        # Hardened kernels do not let anybody read this file.
        read = 0
    states = {fields[0]}
    waited = 0
    for thread in threads:
        # A thread may end meanwhile. Some kernels do not count waits; the states are left then.
        with contextlib.suppress(OSError):
            states.add(_stat(thread)[0])
            waited += int((thread / "schedstat").read_text().split()[1])
    used = (user + system) * _TICK_MILLISECONDS + waited // 1_000_000
    return Activity(fields[0], frozenset(states), used, page_faults + read)


def _stat(folder: Path) -> list[str]:
    """The fields of a process or a thread behind its name, which may contain anything: proc(5)."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def _children(pid: int) -> list[int]:
    """Processes that the main thread has started; loading starts one to read the tokenizer."""
    try:
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    except OSError:
        return []


class Watchdog:
    """Watches one engine process; one that generates must report within a step timeout."""

    def __init__(self, settings: EngineSettings) -> None:
        self._step_timeout = settings.step_timeout_seconds
        self._stalled_looks = math.ceil(settings.stall_timeout_seconds / LOOK_SECONDS)
        self._duty = Duty.NOTHING
        self._seen: Activity | None = None
        self._still = 0
        self._silent = 0

    def heard(self) -> None:
        """The process has sent something."""
        self._still = self._silent = 0

    def look(self, duty: Duty, activity: Activity | None) -> str | None:
        """Take a look, every :data:`LOOK_SECONDS`; returns why the process must be killed."""
        if duty is not self._duty:
            # The time without progress until now belongs to the duty before.
            self._duty = duty
            self.heard()
        self._silent += 1
        self._still = 0 if activity is None or self._has_moved(activity) else self._still + 1
        if activity is not None and self._still >= self._stalled_looks:
            seconds = f"for {self._still * LOOK_SECONDS:g} s"
            if activity.state == _STOPPED:
                return f"it has been stopped {seconds}"
            if duty in (Duty.LOADING, Duty.GENERATING):
                return (
                    f"{duty}, it has not used or awaited a processor, nor read anything, {seconds}"
                )
        if duty is Duty.GENERATING and self._silent * LOOK_SECONDS > self._step_timeout:
            return f"one step has taken more than {self._step_timeout:g} s"
        return None

    def _has_moved(self, activity: Activity) -> bool:
        seen, self._seen = self._seen, activity
        return (
            seen is None
            or not _MOVING_STATES.isdisjoint(activity.states)
            or activity.milliseconds - seen.milliseconds >= _LEAST_MILLISECONDS
            or activity.reads != seen.reads
        )
