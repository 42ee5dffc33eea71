"""Detects an engine process that makes no progress: stopped, deadlocked, or lost in a step.

The kernel counts processor time and reads of every process, so the engine needs no code of its own
for this: docs/adr/0016. Time is counted in looks, not in seconds. When the machine sleeps, the
container is paused or the event loop is late, there are fewer looks, and no false alarm.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

LOOK_SECONDS = 0.5
"""Time between two looks."""

STALLED_LOOKS = 6
"""Looks in a row without progress that are a stall; it is noticed within 3.5 seconds."""

# 20 ms between two looks. A process whose threads only wake and sleep again uses less.
_LEAST_TICKS = 2
# D waits for a disk, where no signal would end it; t is held by a debugger on purpose.
_EXCUSED_STATES = frozenset("Dt")
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
        state: The process' state, as a letter of proc(5).
        ticks: Processor time used, in clock ticks (10 ms on Linux).
        reads: Bytes read plus pages faulted in from disk; only its changes mean anything.
    """

    state: str
    ticks: int
    reads: int


def observe(pid: int) -> Activity | None:
    """Read what the kernel has counted; ``None`` where that is unknown, as outside Linux."""
    own = _read(pid)
    if own is None:
        return None
    children = [_read(child) for child in _children(pid)]
    family = [own, *(child for child in children if child is not None)]
    return Activity(own.state, sum(one.ticks for one in family), sum(one.reads for one in family))


def _read(pid: int) -> Activity | None:
    folder = Path("/proc") / str(pid)
    try:
        # "pid (name) state ...", where the name may contain spaces and brackets: proc(5).
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    page_faults, user, system = map(int, (fields[9], *fields[11:13]))
    try:
        read = int((folder / "io").read_text().split()[1])
    except OSError:
        # Hardened kernels do not let anybody read this file.
        read = 0
    return Activity(fields[0], user + system, page_faults + read)


def _children(pid: int) -> list[int]:
    """Processes that the main thread has started; loading starts one to read the tokenizer."""
    try:
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    except OSError:
        return []


class Watchdog:
    """Watches one engine process; one that generates must report within a step timeout."""

    def __init__(self, step_timeout_seconds: float) -> None:
        self._step_timeout = step_timeout_seconds
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
        if activity is not None and self._still >= STALLED_LOOKS:
            seconds = f"for {self._still * LOOK_SECONDS:.0f} s"
            if activity.state == _STOPPED:
                return f"it has been stopped {seconds}"
            if duty in (Duty.LOADING, Duty.GENERATING):
                return f"{duty}, it has used no processor and read nothing {seconds}"
        if duty is Duty.GENERATING and self._silent * LOOK_SECONDS > self._step_timeout:
            return f"one step has taken more than {self._step_timeout:g} s"
        return None

    def _has_moved(self, activity: Activity) -> bool:
        seen = self._seen
        if (
            seen is not None
            and activity.state not in _EXCUSED_STATES
            and activity.ticks - seen.ticks < _LEAST_TICKS
            and activity.reads == seen.reads
        ):
            return False
        self._seen = activity
        return True
