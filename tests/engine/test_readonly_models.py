"""Models whose files may be read and not written are run by the same engine as others."""

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path

from app.core.config import PROJECT_ROOT
from tests.support.tiny_gguf import make_tiny_gguf

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1

# Loads the local model argv[1] after the statement argv[2], and prints what happened as JSON.
PROGRAM = """
import json, os, sys
from app.core.config import ModelSettings
from app.llm import loader
from app.llm.engine.openvino import gguf_copy
exec(sys.argv[2])
said = []
backend = loader.load_backend(
    ModelSettings(source="local", name=sys.argv[1]),
    max_running=2, echo_step_seconds=0, token=None, progress=said.append)
print(json.dumps([backend.info.backend, backend.info.backend_reason, said]), flush=True)
os._exit(0)
"""


def bind_root() -> None:
    """Make the modes of files hold for root, too, after the next exec."""
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def load_unwritable(model: Path, before: str = "") -> tuple[str, str, list[str]]:
    """Load a model in a folder that may only be read: backend, the reason for it, and progress."""
    for path in (*model.rglob("*"), model, model.parent):
        path.chmod(0o555 if path.is_dir() else 0o444)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, model, before],
        preexec_fn=bind_root,
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    backend, reason, said = json.loads(done.stdout.splitlines()[-1])
    return backend, reason, said


def test_a_gguf_file(tmp_path: Path) -> None:
    """OpenVINO runs a file that may only be read, from a copy in memory."""
    path = make_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    backend, _, said = load_unwritable(path)
    size = path.stat().st_size / 1e6
    assert backend == "openvino"
    assert said == [
        f"loading {path} with OpenVINO",
        f"{path} cannot be written: OpenVINO loads a copy in memory ({size:.0f} MB)",
    ]


def test_memory_without_room_for_a_copy(tmp_path: Path) -> None:
    """The copy is made in the temporary folder, and nothing is left there."""
    path = make_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    place = tmp_path / "tmp"
    place.mkdir()
    before = f"gguf_copy.available_memory = lambda: 0; os.environ['TMPDIR'] = {str(place)!r}"
    backend, _, said = load_unwritable(path, before)
    assert backend == "openvino"
    assert f"OpenVINO loads a copy in {place} (" in said[-1]
    assert list(place.iterdir()) == []


def test_no_room_for_a_copy_at_all(tmp_path: Path) -> None:
    """Transformers runs the model, and the reason says what OpenVINO lacks."""
    path = make_tiny_gguf(tmp_path / "models" / "tiny.gguf")
    before = (
        "gguf_copy.available_memory = lambda: 0; import shutil; from types import SimpleNamespace; "
        "shutil.disk_usage = lambda _: SimpleNamespace(free=0)"
    )
    backend, reason, _ = load_unwritable(path, before)
    assert backend == "transformers"
    assert reason.startswith(
        f"model.engine is auto, but OpenVINO cannot run {path}: it cannot be written, and "
    )


def test_a_folder_with_safetensors(tmp_path: Path, tiny_model_dir: Path) -> None:
    """A folder with safetensors that may only be read loads, also where no home may be written."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "models" / "tiny")
    before = "from huggingface_hub import constants; constants.HF_HOME = '/dev/null'"
    backend, reason, _ = load_unwritable(folder, before)
    assert backend == "transformers"
    assert "its converted weights cannot be kept" in reason
