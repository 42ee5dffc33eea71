"""Turn poetry.lock into pip's requirements files, for the image and `make install TORCH=cpu`.

pip installs what Poetry locked, by version and SHA-256, without Poetry in the image. The CPU
variant leaves torch and its CUDA packages out: the lock's torch wheel for Linux brings 4 GB of
them, so the CPU build of the same version is installed from PyTorch's own index instead.

Needs the standard library of Python 3.11 only.
"""

import argparse
import re
import tomllib
from pathlib import Path
from typing import Any

GPU_ONLY = ("cuda-", "nvidia-", "triton")


def is_gpu_only(name: str) -> bool:
    """Whether a locked package serves nothing but CUDA."""
    return name.startswith(GPU_ONLY)


def requirement(package: dict[str, Any], groups: set[str]) -> str:
    """One locked package as a line of a requirements file; pip evaluates its marker."""
    markers = package.get("markers", "")
    if isinstance(markers, dict):
        # Each group has a marker of its own, or needs the package everywhere.
        of_groups = [markers.get(group, "") for group in package["groups"] if group in groups]
        markers = " or ".join(of_groups) if all(of_groups) else ""
    # pip has no extras in a list of requirements; all are installed, since they are small.
    markers = re.sub(r"extra == (['\"])[\w-]+\1", 'python_version >= "3"', markers)
    condition = f" ; {markers}" if markers else ""
    hashes = "".join(f" \\\n    --hash={file['hash']}" for file in package["files"])
    return f"{package['name']}=={package['version']}{condition}{hashes}"


def write_requirements(lock: Path, variant: str, groups: set[str], folder: Path) -> None:
    """Write three files: requirements.txt has everything, with hashes.

    For the CPU variant torch.txt has torch's CPU build, and gpu.txt the packages that it does not
    need. Otherwise both are empty.
    """
    locked = tomllib.loads(lock.read_text(encoding="utf-8"))["package"]
    packages = [package for package in locked if groups & set(package["groups"])]
    torch = gpu = ""
    if variant == "cpu":
        version = next(package["version"] for package in packages if package["name"] == "torch")
        # Elsewhere every build is one for CPUs, and none is named so.
        torch = f"torch=={version}+cpu ; sys_platform == 'linux'\n"
        torch += f"torch=={version} ; sys_platform != 'linux'\n"
        gpu = "".join(f"{p['name']}\n" for p in packages if is_gpu_only(p["name"]))
        packages = [p for p in packages if p["name"] != "torch" and not is_gpu_only(p["name"])]
    lines = "\n".join(requirement(package, groups) for package in packages)
    (folder / "requirements.txt").write_text(f"{lines}\n", encoding="utf-8")
    (folder / "torch.txt").write_text(torch, encoding="utf-8")
    (folder / "gpu.txt").write_text(gpu, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--dev", action="store_true", help="the development packages, too")
    parser.add_argument("lock", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    chosen = {"main", "dev"} if arguments.dev else {"main"}
    write_requirements(arguments.lock, arguments.variant, chosen, arguments.folder)
