"""What importing the service costs: no model library, little time, and a short chain."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from app.core.config import PROJECT_ROOT
from tests.architecture import syntax

# Gigabytes of libraries that only the engine process may load.
HEAVY = ("torch", "accelerate", "gguf", "openvino", "openvino_genai", "transformers.models")

# Modules of the longest chain in which each imports the next one.
MAX_CHAIN = 17


PROGRAM = """
import json, sys, time
import app.main
seconds = time.process_time()
app.main.app
application = sorted(sys.modules)
import app.cli, app.llm.engine.worker, app.llm.engine.echo
from app.core.config import Settings
app.main.create_app(Settings(_env_file=None))
print(json.dumps([seconds, application, sorted(sys.modules)]))
"""


class Imported(NamedTuple):
    """What an interpreter of its own has done.

    Attributes:
        seconds: Processor time that it had taken once app.main was imported.
        application: The modules in memory once the application is built.
        everything: Those after the command line and an engine without a model, too.
    """

    seconds: float
    application: set[str]
    everything: set[str]


@pytest.fixture(scope="module")
def imported() -> Imported:
    """The imports in an interpreter that has nothing else in memory."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    seconds, application, everything = json.loads(done.stdout.splitlines()[-1])
    return Imported(seconds, set(application), set(everything))


def heavy(modules: set[str]) -> list[str]:
    """Those of the heavy libraries that are in memory."""
    return sorted(m for m in modules if any(m == h or m.startswith(f"{h}.") for h in HEAVY))


def test_the_service_loads_no_model_library(imported: Imported) -> None:
    """The API process, the command line and an engine before loading hold no model library."""
    assert {"app.main", "app.cli", "app.llm.engine.worker"} <= imported.everything
    assert heavy(imported.everything) == []


def test_a_model_library_would_be_seen() -> None:
    """The check above sees a model library where there is one."""
    found = heavy({"torch", "torch.nn", "transformers.models.llama", "torchless", "transformers"})
    assert found == ["torch", "torch.nn", "transformers.models.llama"]


def test_the_engine_does_not_wait_for_imports_of_a_second(imported: Imported) -> None:
    """LangChain and transformers are imported while the model loads: not with the application."""
    late = {"langchain_core", "langchain_huggingface", "transformers"}
    assert not imported.application & late


def test_importing_the_application_is_quick(imported: Imported) -> None:
    """`import app.main` takes less than five seconds of processor time; one is usual."""
    assert imported.seconds < 5


def imported_at_start(path: Path) -> Iterator[str]:
    """What a file imports when it is imported itself: not in functions, not for types alone."""
    waiting: list[ast.AST] = [syntax.tree(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.expr):
            waiting += ast.iter_child_nodes(node)


def longest_chain(folder: Path) -> list[str]:
    """The longest chain of a package's modules in which each imports the next one."""
    paths = {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in folder.rglob("*.py")
    }

    @cache
    def chain(module: str) -> list[str]:
        names = set(imported_at_start(paths[module]))
        # Importing a module of a package imports the package, unless that is where we are.
        names |= {name.rpartition(".")[0] for name in names & paths.keys()}
        ours = {name for name in names if not f"{module}.".startswith(f"{name}.")}
        imported = ours & paths.keys()
        return [module, *max(map(chain, imported), key=len, default=[])]

    return max(map(chain, paths), key=len)


def test_the_chain_of_imports_is_short() -> None:
    """Few modules have to be understood before the last of a chain can be."""
    chain = longest_chain(PROJECT_ROOT / "app")
    assert len(chain) <= MAX_CHAIN, "\n".join([f"{len(chain)} modules:", *chain])


def test_the_longest_chain_is_found(tmp_path: Path) -> None:
    """Imports inside functions and for types alone are no link of a chain; others are."""
    package = tmp_path / "sample"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "a": "import os\nfrom sample import b\n",
        "b": "try:\n    import sample.c\nexcept ImportError:\n    pass\n",
        "c": "if TYPE_CHECKING:\n    import sample.d\n\ndef f():\n    import sample.d\n",
        "d": "from sample.a import name\n",
    }.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    assert longest_chain(package) == ["sample.d", "sample.a", "sample.b", "sample.c"]
