"""Models whose files may be read and not written are run by the same engine as others."""

import ctypes
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.core.config import PROJECT_ROOT
from tests.support.tiny_gguf import make_tiny_gguf

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2

# Reads paths of local models, each with a statement, one pair a line. A fork of this process loads
# the model after the statement, and prints what happened as JSON.
PROGRAM = """
import importlib, json, os, sys
from app.core.config import ModelSettings
from app.llm import loader
from app.llm.engine.openvino import gguf_copy, loading
from app.utils.errors import ModelLoadError
from tests.support.tokenizer_here import TokenizerHere
loading.keep_telemetry_out()
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    path, before = json.loads(line)
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    exec(before)
    said = []
    tell = lambda message, percent=None: percent is None and said.append(message)
    try:
        info = loader.load_backend(
            ModelSettings(source="local", name=path),
            max_running=2, echo_step_seconds=0, token=None, progress=tell).info
        told = info.backend, info.backend_reason, said
    except ModelLoadError as error:
        told = "", str(error), said
    print(json.dumps(told), flush=True)
    os._exit(0)
# To take the libraries down would take seconds.
os._exit(0)
"""

# What the forks would import, each again.
IMPORTED = (
    "app.llm.engine.openvino.backend",
    "app.llm.engine.transformers.backend",
    "app.llm.engine.transformers.gguf",
    "app.llm.engine.transformers.plain",
    "app.llm.engine.transformers.start_check",
    "transformers.models.llama.modeling_llama",
    "transformers.pipelines",
)

# The process that reads the tokenizer would do so, too.
HERE = "loading.TokenizerProcess = TokenizerHere; "

Loader = Callable[..., tuple[str, str, list[str]]]
"""Loads a model in a folder that may only be read: the backend, the reason for it or the error, and
progress."""


def bind_root() -> None:
    """Make the modes of files hold for root, too, after the next exec."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


@pytest.fixture(scope="module")
def load_unwritable() -> Iterator[Loader]:
    """Takes the model's path, and a statement that comes before."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *IMPORTED],
        preexec_fn=bind_root,  # noqa: PLW1509 - it only makes a system call
        cwd=PROJECT_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        asked, answers = process.stdin, process.stdout
        assert asked is not None
        assert answers is not None

        def load(model: Path, before: str = "") -> tuple[str, str, list[str]]:
            for path in (*model.rglob("*"), model, model.parent):
                path.chmod(0o555 if path.is_dir() else 0o444)
            asked.write(json.dumps([str(model), before]) + "\n")
            asked.flush()
            backend, reason, said = json.loads(answers.readline())
            return backend, reason, said

        yield load


def test_a_gguf_file(load_unwritable: Loader, tmp_path: Path) -> None:
    """OpenVINO runs a file that may only be read, from a copy in memory."""
    path = make_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    backend, _, said = load_unwritable(path)
    size = path.stat().st_size / 1e6
    assert backend == "openvino"
    assert said == [
        f"loading {path} with OpenVINO",
        f"{path} cannot be written: OpenVINO loads a copy in memory ({size:.0f} MB)",
        "loading the copy with OpenVINO",
    ]


def test_memory_without_room_for_a_copy(load_unwritable: Loader, tmp_path: Path) -> None:
    """The copy is made in the temporary folder, and nothing is left there."""
    path = make_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    place = tmp_path / "tmp"
    place.mkdir()
    before = (
        f"{HERE}gguf_copy.available_memory = lambda: 0; "
        f"import tempfile; tempfile.tempdir = None; os.environ['TMPDIR'] = {str(place)!r}"
    )
    backend, _, said = load_unwritable(path, before)
    assert backend == "openvino"
    assert f"OpenVINO loads a copy in {place} (" in said[-2]
    assert list(place.iterdir()) == []


def test_no_room_for_a_copy_at_all(load_unwritable: Loader, tmp_path: Path) -> None:
    """Transformers runs the model, and the reason says what OpenVINO lacks."""
    path = make_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    before = (
        f"{HERE}gguf_copy.available_memory = lambda: 0; "
        "import shutil; from types import SimpleNamespace; "
        "shutil.disk_usage = lambda _: SimpleNamespace(free=0)"
    )
    backend, reason, _ = load_unwritable(path, before)
    assert backend == "transformers"
    assert reason.startswith(
        f"model.engine is auto, but OpenVINO cannot run {path}: it cannot be written, and "
    )


def test_a_folder_with_safetensors(
    load_unwritable: Loader, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """A folder with safetensors that may only be read loads as any other."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "models" / "tiny")
    assert load_unwritable(folder)[0] == "transformers"


def test_a_file_that_may_not_be_read(
    load_unwritable: Loader, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """The error is about the file's mode, and not about its content."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "models" / "tiny")
    _, error, _ = load_unwritable(folder, "os.chmod(path + '/model.safetensors', 0)")
    assert error == (
        f"{folder}/model.safetensors may not be read by the service's user: change its owner or "
        "its mode"
    )
