"""Cores and memory of the engine: affinity, hardware threads, control groups of both versions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.core.machine import (
    THREADS_VARIABLE,
    available_cores,
    available_memory,
    compute_threads,
)
from app.llm.client import process

V2_MOUNT = "31 23 0:28 {root} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"


def write(root: Path, path: str, text: str) -> None:
    """Write a file below a fake root."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def v2(root: Path, group: str = "/", mounted: str = "/") -> None:
    """A machine with control groups of version 2."""
    write(root, "proc/self/cgroup", f"0::{group}")
    write(
        root,
        "proc/self/mountinfo",
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n" + V2_MOUNT.format(root=mounted),
    )


def v1(root: Path, group: str = "/", mounted: str = "/") -> None:
    """A machine with control groups of version 1."""
    write(root, "proc/self/cgroup", f"5:memory:/other\n4:cpu,cpuacct:{group}\n0::/")
    write(root, "proc/self/mountinfo", V1_MOUNT.format(root=mounted))


def test_without_a_quota_every_processor_counts(tmp_path: Path) -> None:
    """Without control groups or limits, all processors of the affinity count."""
    assert available_cores(tmp_path, range(6)) == 6
    v2(tmp_path)
    write(tmp_path, "sys/fs/cgroup/cpu.max", "max 100000")
    assert available_cores(tmp_path, range(6)) == 6
    v1(tmp_path)
    write(tmp_path, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1")
    write(tmp_path, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000")
    assert available_cores(tmp_path, range(6)) == 6


def test_hardware_threads_of_one_core_count_once(tmp_path: Path) -> None:
    """Four processors on two cores are two, and one processor of a pair is a core."""
    for processor, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        topology = f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
        write(tmp_path, topology, siblings)
    assert available_cores(tmp_path, range(4)) == 2
    assert available_cores(tmp_path, [0, 1, 2]) == 2
    assert available_cores(tmp_path, [0, 2]) == 1


@pytest.mark.parametrize(
    ("quota", "cores"), [(50_000, 1), (100_000, 1), (150_000, 1), (250_000, 2), (3_200_000, 16)]
)
def test_a_quota_counts_in_whole_cores(tmp_path: Path, quota: int, cores: int) -> None:
    """In both versions a quota is rounded down to at least one core and at most all cores."""
    unified, split = tmp_path / "v2", tmp_path / "v1"
    v2(unified)
    write(unified, "sys/fs/cgroup/cpu.max", f"{quota} 100000")
    assert available_cores(unified, range(16)) == cores
    v1(split)
    write(split, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", str(quota))
    write(split, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000")
    assert available_cores(split, range(16)) == cores


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    """A parent group's limit applies to its children."""
    v2(tmp_path, "/pods/pod1/main")
    write(tmp_path, "sys/fs/cgroup/pods/pod1/main/cpu.max", "max 100000")
    write(tmp_path, "sys/fs/cgroup/pods/pod1/cpu.max", "300000 100000")
    write(tmp_path, "sys/fs/cgroup/pods/cpu.max", "800000 100000")
    write(tmp_path, "sys/fs/cgroup/pods/pod2/cpu.max", "100000 100000")
    assert available_cores(tmp_path, range(16)) == 3


@pytest.mark.parametrize("mounted", ["/docker/abc", "/elsewhere"])
def test_a_container_without_a_cgroup_namespace(tmp_path: Path, mounted: str) -> None:
    """A group with the host's path is found at the container's mount."""
    v1(tmp_path, "/docker/abc", mounted)
    write(tmp_path, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "400000")
    write(tmp_path, "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000")
    assert available_cores(tmp_path, range(16)) == 4


def test_a_path_never_leads_out_of_the_mount(tmp_path: Path) -> None:
    """A group outside the namespace's root, shown as ``/../``, reads no file outside the mount."""
    v2(tmp_path, "/../other")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "200000 100000")
    write(tmp_path, "sys/fs/other/cpu.max", "100000 100000")
    assert available_cores(tmp_path, range(16)) == 2


def test_malformed_limits_are_ignored(tmp_path: Path) -> None:
    """A limit that cannot be parsed is no limit."""
    v2(tmp_path)
    for text in ("", "max", "lots of time", "0 100000", "100000 0"):
        write(tmp_path, "sys/fs/cgroup/cpu.max", text)
        assert available_cores(tmp_path, range(3)) == 3


def test_this_machine_has_no_more_cores_than_the_process_may_use() -> None:
    """The real files give at least one core and at most all processors."""
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_a_set_number_of_threads_is_kept() -> None:
    """``OMP_NUM_THREADS`` is used if it is a positive number."""
    assert compute_threads({THREADS_VARIABLE: "7"}) == 7
    assert compute_threads({THREADS_VARIABLE: "5,2"}) == 5
    for nonsense in ("", "0", "-2", "many"):
        assert compute_threads({THREADS_VARIABLE: nonsense}) == available_cores()
    assert compute_threads({}) == available_cores()


def test_torch_in_the_engine_process_has_that_many_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The environment of the engine process sets torch's number of threads."""
    monkeypatch.delenv(THREADS_VARIABLE, raising=False)
    monkeypatch.setattr("app.core.machine.available_cores", lambda: 1)
    done = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.get_num_threads())"],
        env=process.engine_environment(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "1"


def meminfo(root: Path, kilobytes: int) -> None:
    """A machine with this much available memory."""
    text = f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {kilobytes} kB"
    write(root, "proc/meminfo", text)


def test_available_memory_is_the_machines(tmp_path: Path) -> None:
    """Memory that the kernel can free counts, and a group without a limit changes nothing."""
    meminfo(tmp_path, 1000)
    assert available_memory(tmp_path) == 1_024_000
    v2(tmp_path)
    write(tmp_path, "sys/fs/cgroup/memory.max", "max")
    assert available_memory(tmp_path) == 1_024_000


def test_memory_is_within_every_groups_limit(tmp_path: Path) -> None:
    """The group with the least room decides, and its inactive file cache counts as free."""
    meminfo(tmp_path, 1000)
    v2(tmp_path, group="/a/b")
    write(tmp_path, "sys/fs/cgroup/a/memory.max", "900000")
    write(tmp_path, "sys/fs/cgroup/a/memory.current", "600000")
    assert available_memory(tmp_path) == 300_000
    write(tmp_path, "sys/fs/cgroup/a/memory.stat", "anon 100\ninactive_file 200000\nfile 250000")
    assert available_memory(tmp_path) == 500_000
    write(tmp_path, "sys/fs/cgroup/a/b/memory.max", "400000")
    write(tmp_path, "sys/fs/cgroup/a/b/memory.current", "400100")
    assert available_memory(tmp_path) == 0


def test_memory_within_a_limit_of_version_1(tmp_path: Path) -> None:
    """The memory controller's hierarchy is found beside those of other controllers."""
    meminfo(tmp_path, 1000)
    write(tmp_path, "proc/self/cgroup", "5:memory:/box\n4:cpu,cpuacct:/other")
    mount = "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
    write(tmp_path, "proc/self/mountinfo", mount)
    write(tmp_path, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", "500000")
    write(tmp_path, "sys/fs/cgroup/memory/box/memory.usage_in_bytes", "100000")
    assert available_memory(tmp_path) == 400_000
