"""How many threads a forward pass should use on this machine.

The libraries count the processors they see. In a container with a CPU quota that is the whole
host: thirty-two threads then share two cores' worth of time, and the kernel stops all of them for
most of every period. Nothing here imports torch, because the answer must be known before its
thread pool starts.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

THREADS_VARIABLE = "OMP_NUM_THREADS"
"""Environment variable in which OpenMP, and with it torch, finds its number of threads."""

_ROOT = Path("/")


def compute_threads(environment: Mapping[str, str]) -> int:
    """Threads for a forward pass: what ``OMP_NUM_THREADS`` asks for, else one for each core.

    Args:
        environment: Where the variable may be set; a value that is no count is ignored.
    """
    # OpenMP takes a list, one count for each level of nesting; the first is the one that counts.
    asked = environment.get(THREADS_VARIABLE, "").partition(",")[0].strip()
    return int(asked) if asked.isdecimal() and int(asked) > 0 else available_cores()


def available_cores(root: Path = _ROOT, processors: Collection[int] | None = None) -> int:
    """Physical cores this process may use, within its CPU quota; at least one.

    Part of a core is not counted: a thread that gets half a core holds up all others at the end
    of every layer, and the service beside the engine needs some time too.

    Args:
        root: Where ``/proc`` and ``/sys`` are found.
        processors: Numbers of the processors it may run on; default: its affinity.
    """
    cores = _physical_cores(root, _affinity() if processors is None else processors)
    quota = min(_quotas(root), default=float(cores))
    return max(1, min(cores, int(quota)))


def _affinity() -> Collection[int]:
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # macOS has none.
        return range(os.cpu_count() or 1)


def _physical_cores(root: Path, processors: Collection[int]) -> int:
    """Two hardware threads of one core count once: they share its arithmetic units."""
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    siblings = {_read(root / topology.format(p)) or str(p) for p in processors}
    return len(siblings)


def _quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that each control group above this process allows."""
    groups = _own_groups(root)
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        _, _, _, mounted, at, *_ = before.split()
        kind, _, options = after.split(maxsplit=2)
        if kind == "cgroup2":
            controller = ""
        elif kind == "cgroup" and "cpu" in options.split(","):
            controller = "cpu"
        else:
            continue
        if controller in groups:
            top = root / at.lstrip("/")
            for folder in _folders(top, mounted, groups[controller]):
                yield from _quota(folder)


def _own_groups(root: Path) -> dict[str, str]:
    """This process's control group for each version-1 controller; version 2's is unnamed."""
    groups: dict[str, str] = {}
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path)
    return groups


def _folders(top: Path, mounted: str, group: str) -> Iterator[Path]:
    """A control group's folder and all above it, as far as the mount shows them."""
    path = PurePosixPath(group)
    # A container without a cgroup namespace reads its path on the host, of which only the part
    # below the mounted folder is there.
    inside = path.relative_to(mounted) if path.is_relative_to(mounted) else PurePosixPath()
    if ".." in inside.parts:
        inside = PurePosixPath()
    yield top / inside
    for parent in inside.parents:
        if parent != inside:
            yield top / parent


def _quota(folder: Path) -> Iterator[float]:
    limit, _, period = (_read(folder / "cpu.max") or "").partition(" ")
    if not limit:
        limit = _read(folder / "cpu.cfs_quota_us") or ""
        period = _read(folder / "cpu.cfs_period_us") or ""
    # "max", or -1 in version 1, is no limit.
    if limit.isdecimal() and period.isdecimal() and int(limit) and int(period):
        yield int(limit) / int(period)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
