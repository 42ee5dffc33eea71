"""What holds for the code as a whole; who may import whom is checked by `make imports`."""

import ast
from collections.abc import Iterator

import pytest

from app.core.config import PROJECT_ROOT
from tests.architecture import syntax

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef
Code = dict[str, list[ast.AST]]


@pytest.fixture(scope="module")
def code() -> Code:
    """The nodes of every Python file, by its path inside the project."""
    return {
        str(path.relative_to(PROJECT_ROOT)): syntax.nodes(path)
        for folder in ("app", "benchmarks", "scripts", "tests")
        for path in sorted((PROJECT_ROOT / folder).rglob("*.py"))
    }


def functions(nodes: list[ast.AST]) -> Iterator[Function]:
    """The functions and methods among nodes."""
    yield from (node for node in nodes if isinstance(node, Function))


def imports(nodes: list[ast.AST]) -> Iterator[str]:
    """What is imported, anywhere in a file: modules, and names with their module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def users(code: Code, folder: str, *beginnings: str) -> set[str]:
    """The files of a folder that import something whose name begins so."""
    return {
        name
        for name, nodes in code.items()
        if name.startswith(f"{folder}/")
        for module in imports(nodes)
        if module.startswith(beginnings)
    }


def test_files_stay_small(code: Code) -> None:
    """Past 400 lines in a file a concept is missing."""
    lines = {
        name: len((PROJECT_ROOT / name).read_text(encoding="utf-8").splitlines()) for name in code
    }
    assert {name: count for name, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_functions_stay_small(code: Code) -> None:
    """Past 60 lines in a function a concept is missing."""
    lines = {
        f"{name}:{f.name}": (f.end_lineno or 0) - f.lineno + 1
        for name, nodes in code.items()
        for f in functions(nodes)
    }
    assert {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES} == {}


def test_every_test_states_its_guarantee(code: Code) -> None:
    """Each test has a docstring that is a sentence."""
    tests = {
        f"{name}:{f.name}": ast.get_docstring(f) or ""
        for name, nodes in code.items()
        if name.startswith("tests/")
        for f in functions(nodes)
        if f.name.startswith("test_")
    }
    assert tests
    assert [name for name, text in tests.items() if not text.endswith(".")] == []


def test_no_test_uses_a_mock_library(code: Code) -> None:
    """Fakes are written by hand: a mock agrees with any interface, also with one that is gone."""
    assert users(code, "tests", "mock", "pytest_mock", "unittest.mock") == set()


def test_langchain_stays_in_its_file(code: Code) -> None:
    """One file absorbs what LangChain changes."""
    assert users(code, "app", "langchain") == {"app/llm/chain.py"}
