"""Turn poetry.lock into pip's requirements files; the image's builder runs it.

pip installs what Poetry locked, by version and SHA-256, without Poetry in the image. The CPU
variant leaves torch and its CUDA packages out: the lock's torch wheel for Linux brings 4 GB of
them, so the CPU build of the same version is installed from PyTorch's own index instead.

Needs the standard library of Python 3.11 only.
"""

import argparse
import tomllib
from pathlib import Path
from typing import Any

GPU_ONLY = ("cuda-", "nvidia-", "triton")


def is_gpu_only(name: str) -> bool:
    """Whether a locked package serves nothing but CUDA."""
    return name.startswith(GPU_ONLY)


def requirement(package: dict[str, Any]) -> str:
    """One locked package as a line of a requirements file; pip evaluates its marker."""
    markers = package.get("markers", "")
    if isinstance(markers, dict):
        markers = markers.get("main", "")
    condition = f" ; {markers}" if markers else ""
    hashes = "".join(f" \\\n    --hash={file['hash']}" for file in package["files"])
    return f"{package['name']}=={package['version']}{condition}{hashes}"


def write_requirements(lock: Path, variant: str, folder: Path) -> None:
    """Write requirements.txt (everything with hashes) and torch.txt (the CPU build, or nothing)."""
    locked = tomllib.loads(lock.read_text(encoding="utf-8"))["package"]
    packages = [package for package in locked if "main" in package["groups"]]
    torch = ""
    if variant == "cpu":
        version = next(package["version"] for package in packages if package["name"] == "torch")
        torch = f"torch=={version}+cpu\n"
        packages = [p for p in packages if p["name"] != "torch" and not is_gpu_only(p["name"])]
    lines = "\n".join(requirement(package) for package in packages)
    (folder / "requirements.txt").write_text(f"{lines}\n", encoding="utf-8")
    (folder / "torch.txt").write_text(torch, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=("cpu", "cuda"), required=True)
    parser.add_argument("lock", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_requirements(arguments.lock, arguments.variant, arguments.folder)
