"""Describes the machine, the versions and the revision of a measurement."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks import peers
from benchmarks.paths import ROOT

_PACKAGES = ("torch", "transformers", "openvino-genai", "fastapi", "uvicorn")


def _first(path: str, name: str) -> str:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((x.partition(":")[2].strip() for x in lines if x.startswith(name)), "unknown")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def describe(device: str) -> dict[str, str]:
    """The processor, the versions, the commit and the command of a measurement."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = _first("/proc/cpuinfo", "flags").split()
    features = [
        f for f in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile") if f in flags
    ]
    memory = _first("/proc/meminfo", "MemTotal").removesuffix(" kB")
    gib = f"{int(memory) / 2**20:.0f} GiB" if memory.isdigit() else "unknown memory"
    found = {
        "processor": f"{_first('/proc/cpuinfo', 'model name')}, {cores} cores, {gib}; "
        + " ".join(features),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "peers": "; ".join(
            ", ".join(f"{package} {number}" for package, number in peers.versions(name).items())
            for name in ("transformers-serve", "llama")
        ),
        "commit": _output("git", "rev-parse", "--short", "HEAD") or "unknown",
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
    }
    if device == "cuda":
        query = ("--query-gpu=name,memory.total", "--format=csv,noheader")
        found["GPU"] = _output("nvidia-smi", *query) or "unknown"
    return found


def lines(description: Mapping[str, str], *only: str) -> str:
    """A description, or those of its lines that ``only`` names, as a Markdown list."""
    shown = {n: value for n, value in description.items() if value and (n in only or not only)}
    return "\n".join(f"- {name}: {value}" for name, value in shown.items())
