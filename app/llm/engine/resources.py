"""How many threads and how much memory this process may use on this machine.

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
    for folder in _group_folders(root, "cpu"):
        yield from _quota(folder)


def available_memory(root: Path = _ROOT) -> int:
    """Bytes this process may still take: what is free, within its control groups' limits.

    Args:
        root: Where ``/proc`` and ``/sys`` are found.
    """
    limits = (room for folder in _group_folders(root, "memory") for room in _memory_room(folder))
    return max(0, min([_free_memory(root), *limits]))


def _free_memory(root: Path) -> int:
    available = _keyed(root / "proc/meminfo").get("MemAvailable:")
    if available is not None:
        return int(available) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory_room(folder: Path) -> Iterator[int]:
    """What a control group may still take, where it has a limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        most, current = _read(folder / limit) or "", _read(folder / used) or ""
        if most.isdecimal() and current.isdecimal():
            # Files that were read and not used again make room when it is needed.
            dropped = int(_keyed(folder / "memory.stat").get("inactive_file", 0))
            yield int(most) - max(0, int(current) - dropped)


def _group_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups above this process that have ``controller``."""
    groups = _own_groups(root)
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        _, _, _, mounted, at, *_ = before.split()
        kind, _, options = after.split(maxsplit=2)
        if kind == "cgroup2":
            name = ""
        elif kind == "cgroup" and controller in options.split(","):
            name = controller
        else:
            continue
        if name in groups:
            yield from _folders(root / at.lstrip("/"), mounted, groups[name])


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


def _keyed(path: Path) -> dict[str, str]:
    """A file of lines with a name and a number."""
    lines = (line.split() for line in (_read(path) or "").splitlines())
    return {words[0]: words[1] for words in lines if len(words) > 1}


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
