"""What importing the service costs: no model library, and little time."""

import json
import subprocess
import sys
import time

import pytest

from app.core.config import PROJECT_ROOT

# Gigabytes of libraries that only the engine process may load.
HEAVY = ("torch", "accelerate", "gguf", "openvino", "openvino_genai", "transformers.models")


def loaded_by(statement: str) -> set[str]:
    """The modules in memory after a statement, in an interpreter of its own."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def heavy(modules: set[str]) -> list[str]:
    """Those of the heavy libraries that are in memory."""
    return sorted(m for m in modules if any(m == h or m.startswith(f"{h}.") for h in HEAVY))


@pytest.mark.parametrize(
    "module", ["app.main", "app.cli", "app.llm.engine.worker", "app.llm.engine.echo"]
)
def test_importing_the_service_loads_no_model_library(module: str) -> None:
    """The API process, the command line and an engine before loading hold no model library."""
    loaded = loaded_by(f"import {module}")
    assert module in loaded
    assert heavy(loaded) == []


def test_a_model_library_would_be_seen() -> None:
    """The check above sees a model library where there is one."""
    found = heavy({"torch", "torch.nn", "transformers.models.llama", "torchless", "transformers"})
    assert found == ["torch", "torch.nn", "transformers.models.llama"]


def test_building_the_application_loads_no_model_library() -> None:
    """Neither does building the application, with everything it is made of."""
    statement = (
        "from app.core.config import Settings\n"
        "from app.main import create_app\n"
        "create_app(Settings(_env_file=None))"
    )
    assert heavy(loaded_by(statement)) == []


def test_the_engine_does_not_wait_for_imports_of_a_second() -> None:
    """LangChain and transformers are imported while the model loads: not with the application."""
    loaded = loaded_by("import app.main\napp.main.app")
    assert not loaded & {"langchain_core", "langchain_huggingface", "transformers"}


def test_importing_the_application_is_quick() -> None:
    """`import app.main` takes less than five seconds; on idle cores it is half of one."""
    started = time.monotonic()
    loaded_by("import app.main")
    assert time.monotonic() - started < 5
