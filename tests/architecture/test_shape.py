"""What holds for the code as a whole; who may import whom is checked by `make imports`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.config import PROJECT_ROOT

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[Path]:
    """All Python files of these folders."""
    return sorted(p for folder in folders for p in (PROJECT_ROOT / folder).rglob("*.py"))


def functions(path: Path) -> Iterator[Function]:
    """Every function and method of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function):
            yield node


def imports(path: Path) -> Iterator[str]:
    """The modules a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def name_of(path: Path) -> str:
    """A file's path inside the project."""
    return str(path.relative_to(PROJECT_ROOT))


@pytest.mark.parametrize("path", sources("app", "benchmarks", "scripts", "tests"), ids=name_of)
def test_files_and_functions_stay_small(path: Path) -> None:
    """Past 400 lines a file, or 60 a function, a concept is missing."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    long = {
        function.name: length
        for function in functions(path)
        if (length := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert long == {}


def test_every_test_states_its_guarantee() -> None:
    """Each test has a docstring that is a sentence."""
    tests = {
        f"{name_of(path)}:{f.name}": ast.get_docstring(f) or ""
        for path in sources("tests")
        for f in functions(path)
        if f.name.startswith("test_")
    }
    assert tests
    assert [name for name, text in tests.items() if not text.endswith(".")] == []


def test_no_test_uses_a_mock_library() -> None:
    """Fakes are written by hand: a mock agrees with any interface, also with one that is gone."""
    users = {
        name_of(path)
        for path in sources("tests")
        for module in imports(path)
        if module.partition(".")[0] in ("mock", "pytest_mock") or module.startswith("unittest.mock")
    }
    assert users == set()


def test_langchain_stays_in_its_file() -> None:
    """One file absorbs what LangChain changes."""
    users = {
        name_of(path)
        for path in sources("app")
        for module in imports(path)
        if module.startswith("langchain")
    }
    assert users == {"app/llm/chain.py"}
