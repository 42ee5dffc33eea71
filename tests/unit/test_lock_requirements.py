"""pip's requirements files, as the image's builder and `make install TORCH=cpu` use them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from app.core.config import PROJECT_ROOT

SCRIPT = PROJECT_ROOT / "deploy" / "docker" / "lock_requirements.py"
LOCK = PROJECT_ROOT / "poetry.lock"


def written(folder: Path, *options: str, lock: Path = LOCK) -> dict[str, dict[str, str]]:
    """What the script writes: for each file the packages, and the rest of their lines."""
    command = [sys.executable, str(SCRIPT), *options, str(lock), str(folder)]
    subprocess.run(command, check=True, timeout=60)
    return {
        path.stem: dict(
            re.findall(r"^([\w.-]+)(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        )
        for path in folder.glob("*.txt")
    }


def locked(*groups: str) -> set[str]:
    """The packages of groups in poetry.lock."""
    packages = tomllib.loads(LOCK.read_text(encoding="utf-8"))["package"]
    return {package["name"] for package in packages if set(groups) & set(package["groups"])}


@pytest.mark.parametrize("groups", [("main",), ("main", "dev")], ids=len)
def test_cpu_leaves_out_cuda_alone(tmp_path: Path, groups: tuple[str, ...]) -> None:
    """For CPUs every locked package is installed, torch as its CPU build, but those of CUDA."""
    files = written(tmp_path, "--variant", "cpu", *(["--dev"] if "dev" in groups else []))
    assert set(files["requirements"]) | set(files["torch"]) | set(files["gpu"]) == locked(*groups)
    assert set(files["torch"]) == {"torch"}
    assert {"triton", "nvidia-cublas"} < set(files["gpu"])
    assert set(files["requirements"]) & set(files["gpu"]) == set()


def test_cuda_is_what_is_locked(tmp_path: Path) -> None:
    """For GPUs every locked package is installed as it is locked."""
    files = written(tmp_path, "--variant", "cuda")
    assert set(files["requirements"]) == locked("main")
    assert files["torch"] == files["gpu"] == {}


def test_a_package_of_two_groups_has_the_marker_of_either(tmp_path: Path) -> None:
    """A package that one group needs everywhere has no marker; otherwise either marker counts."""
    package = '[[package]]\nname = "{}"\nversion = "1"\ngroups = ["main", "dev"]\nfiles = []\n'
    lock = tmp_path / "lock"
    lock.write_text(
        package.format("both") + "markers = {main = \"os_name == 'a'\", dev = \"os_name == 'b'\"}\n"
        + package.format("one") + "markers = {dev = \"os_name == 'b'\"}\n",
        encoding="utf-8",
    )  # fmt: skip
    lines = written(tmp_path, "--variant", "cuda", "--dev", lock=lock)["requirements"]
    assert lines == {"both": "==1 ; os_name == 'a' or os_name == 'b'", "one": "==1"}
    lines = written(tmp_path, "--variant", "cuda", lock=lock)["requirements"]
    assert lines == {"both": "==1 ; os_name == 'a'", "one": "==1"}


def test_packages_of_extras_are_installed(tmp_path: Path) -> None:
    """A package that an extra needs is installed, under the other conditions of its marker."""
    lock = tmp_path / "lock"
    lock.write_text(
        '[[package]]\nname = "one"\nversion = "1"\ngroups = ["main"]\nfiles = []\n'
        "markers = \"extra == 'redis' and os_name == 'a'\"\n",
        encoding="utf-8",
    )
    files = written(tmp_path, "--variant", "cuda", lock=lock)
    assert files["requirements"]["one"] == "==1 ; python_version >= \"3\" and os_name == 'a'"
