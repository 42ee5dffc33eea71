"""Everything that needs a GPU, in about ten minutes: ``python -m scripts.gpu_check [MODEL ...]``.

The tests marked gpu, then tokens/s and TTFT at 1, 8, 64 and 256 clients, of this service with vLLM
beside ``vllm serve`` and with transformers beside transformers serve: on the bundled model, and on
each folder with safetensors that is named. `make install-vllm` comes first. The figures are in
``.bench/results``; docs/performance.md gets them by hand, with the machine.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from app.core.config import PROJECT_ROOT

MOST_SECONDS = 270


def run(*command: str, model: Path | None = None) -> bool:
    """Run a module of the project; returns whether it succeeded in time."""
    print("+", *command, model or "", flush=True)
    chosen = {"BENCH_MODEL": str(model)} if model else {}
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=PROJECT_ROOT,
            env={**os.environ, **chosen},
            timeout=MOST_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(f"  it took more than {MOST_SECONDS} s", flush=True)
        return False
    return done.returncode == 0


def main() -> int:
    """Run all checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="folders with safetensors")
    models: list[Path | None] = [None, *parser.parse_args().models]
    passed = [run("pytest", "tests", "-m", "gpu", "-q")]
    table = ("benchmarks", "table", "--device", "cuda", "--rounds", "1")
    passed += [run(*table, model=model) for model in models]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
