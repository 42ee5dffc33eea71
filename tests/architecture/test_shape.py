"""What holds for the code as a whole; who may import whom is checked by `make imports`."""

import ast
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.config import PROJECT_ROOT

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
HEAVY = ("torch", "openvino", "openvino_genai", "accelerate", "gguf")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[Path]:
    """All Python files of these folders."""
    return sorted(p for folder in folders for p in (PROJECT_ROOT / folder).rglob("*.py"))


def _relative(path: Path) -> str:
    return str(path.relative_to(PROJECT_ROOT))


def functions(path: Path) -> Iterator[Function]:
    """Every function of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def test_importing_the_application_loads_no_model_library() -> None:
    """The API process starts in seconds and holds no torch: a fresh interpreter shows it."""
    code = "import json, sys, app.main; print(json.dumps(sorted(sys.modules)))"
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT_ROOT
    )
    seconds = time.monotonic() - started
    modules = json.loads(result.stdout)
    assert [m for m in modules if m.split(".")[0] in HEAVY] == []
    assert [m for m in modules if m.startswith("transformers.models.")] == []
    # It takes about two seconds on two idle cores.
    assert seconds < 30


def test_importing_the_application_reads_no_settings() -> None:
    """A broken configuration matters when the application is made, not when it is imported."""
    result = subprocess.run(
        [sys.executable, "-c", "import app.main"],
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT_ROOT,
        env={"MODEL__DEVICE": "abacus", "PATH": ""},
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", sources("app", "scripts", "tests"), ids=_relative)
def test_files_and_functions_stay_small(path: Path) -> None:
    """Past 400 lines a file, or 60 a function, a concept is missing."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    long = {
        f.name: f.end_lineno - f.lineno + 1
        for f in functions(path)
        if f.end_lineno and f.end_lineno - f.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_every_test_states_its_guarantee() -> None:
    """Each test function has a docstring."""
    silent = [
        f"{path.name}:{f.name}"
        for path in sources("tests")
        for f in functions(path)
        if f.name.startswith("test_") and not ast.get_docstring(f)
    ]
    assert silent == []


def test_langchain_stays_in_its_file() -> None:
    """One file absorbs what LangChain changes."""
    users = [
        path.name
        for path in sources("app")
        if any(
            name.split(".")[0].startswith("langchain")
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
            )
        )
    ]
    assert users == ["chain.py"]
