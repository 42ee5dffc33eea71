"""How many threads and how much memory this process may use on this machine.

Libraries count the processors they see. In a container with a CPU quota those are the host's: 32
threads then share the time of two cores, and the kernel stops them for most of each period. This
module does not import torch, because the number must be known before torch's thread pool starts.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

THREADS_VARIABLE = "OMP_NUM_THREADS"
"""Environment variable from which OpenMP, and so torch, reads its number of threads."""

_ROOT = Path("/")


def compute_threads(environment: Mapping[str, str]) -> int:
    """Threads of a forward pass: a positive ``OMP_NUM_THREADS``, else one for each core."""
    # OpenMP accepts a list with a number for each nesting level; the first is for the outermost.
    asked = environment.get(THREADS_VARIABLE, "").partition(",")[0].strip()
    return int(asked) if asked.isdecimal() and int(asked) > 0 else available_cores()


def available_cores(root: Path = _ROOT, processors: Collection[int] | None = None) -> int:
    """Physical cores this process may use, within its CPU quota; at least one.

    A quota is rounded down: a thread with half a core delays all others at the end of each layer,
    and the API process needs some time too.

    Args:
        root: Parent folder of ``proc`` and ``sys``.
        processors: Numbers of the processors it may run on; default: its affinity.
    """
    cores = _physical_cores(root, _affinity() if processors is None else processors)
    quotas = (quota for folder in _group_folders(root, "cpu") for quota in _quota(folder))
    return max(1, int(min([cores, *quotas])))


def _affinity() -> Collection[int]:
    try:
        return os.sched_getaffinity(0)
    except AttributeError:  # macOS has none.
        return range(os.cpu_count() or 1)


def _physical_cores(root: Path, processors: Collection[int]) -> int:
    """Number of cores; hardware threads of one core count once, since they share its units."""
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return len({_read(root / topology.format(p)) or str(p) for p in processors})


def available_memory(root: Path = _ROOT) -> int:
    """Bytes this process may still allocate: free memory, within its control groups' limits."""
    limits = (room for folder in _group_folders(root, "memory") for room in _memory_room(folder))
    return max(0, min([_free_memory(root), *limits]))


def _free_memory(root: Path) -> int:
    available = _keyed(root / "proc/meminfo").get("MemAvailable:")
    if available is not None:
        return int(available) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory_room(folder: Path) -> Iterator[int]:
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        most, current = _read(folder / limit) or "", _read(folder / used) or ""
        if most.isdecimal() and current.isdecimal():
            # The kernel frees cached files that are not in use when memory is needed.
            dropped = int(_keyed(folder / "memory.stat").get("inactive_file", 0))
            yield int(most) - max(0, int(current) - dropped)


def _group_folders(root: Path, controller: str) -> Iterator[Path]:
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
    """Path of this process's group by version-1 controller; version 2 has the empty name."""
    groups: dict[str, str] = {}
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path)
    return groups


def _folders(top: Path, mounted: str, group: str) -> Iterator[Path]:
    """A control group's folder and its parents, up to the mount."""
    path = PurePosixPath(group)
    # Without a cgroup namespace a container reads its path on the host, and only the part below the
    # mounted folder exists.
    inside = path.relative_to(mounted) if path.is_relative_to(mounted) else PurePosixPath()
    if ".." in inside.parts:
        inside = PurePosixPath()
    yield top / inside
    for parent in inside.parents:
        yield top / parent


def _quota(folder: Path) -> Iterator[float]:
    limit, _, period = (_read(folder / "cpu.max") or "").partition(" ")
    if not limit:
        limit = _read(folder / "cpu.cfs_quota_us") or ""
        period = _read(folder / "cpu.cfs_period_us") or ""
    # "max" in version 2 and -1 in version 1 mean no limit.
    if limit.isdecimal() and period.isdecimal() and int(limit) and int(period):
        yield int(limit) / int(period)


def _keyed(path: Path) -> dict[str, str]:
    lines = (line.split() for line in (_read(path) or "").splitlines())
    return {words[0]: words[1] for words in lines if len(words) > 1}


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
