"""Paths of the benchmarks' files; ``.bench`` is git-ignored and may be deleted.

``BENCH_MODEL`` names a folder with safetensors that stands for the bundled model's.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".bench"
ENVIRONMENTS = WORK / "envs"
MODEL = Path(os.environ.get("BENCH_MODEL") or WORK / "model")
STAND_IN = WORK / "stand-in"
LOGS = WORK / "logs"
RESULTS = WORK / "results"
PAGE = ROOT / "docs" / "performance.md"
PLOTS = ROOT / "docs" / "performance"
