"""The command line: `check` refuses what cannot start, in one line, and nothing else."""

import contextlib
import json
import logging
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from app.cli import main
from app.core.config import PROJECT_ROOT
from tests.conftest import restored_logging
from tests.support.service import isolated_environment
from tests.support.tiny_model import make_tiny_model

Check = Callable[..., tuple[int, str]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Check]:
    """Runs `check` with settings of the environment; returns its status and its last line."""

    def run(**settings: str) -> tuple[int, str]:
        for name, value in isolated_environment({"MODEL__ENGINE": "auto", **settings}).items():
            monkeypatch.setenv(name, value)
        status = main(["check"])
        said = capfd.readouterr()
        (line,) = (said.out if status == 0 else said.err).splitlines()
        return status, line

    with restored_logging():
        yield run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model that tests may break."""
    return make_tiny_model(tmp_path / "model")


def test_check_accepts_what_starts(check: Check, model: Path) -> None:
    """A whole local model on a free address is valid."""
    assert check(MODEL__SOURCE="local", MODEL__NAME=str(model)) == (
        0,
        f"the configuration is valid: local {model} on cpu",
    )


BAD = {
    "pattern": ({"OUTPUT__BLOCKED_PATTERNS": '["("]'}, "blocked pattern '(': missing )"),
    "pii pattern": ({"PII__PATTERNS": '[{"name": "a", "pattern": "(?=b)"}]'}, "pii pattern 'a': "),
    "no folder": ({"MODEL__SOURCE": "local", "MODEL__NAME": "/nowhere"}, "/nowhere does not exist"),
    "no name": ({"MODEL__NAME": "not a name"}, "is not a hub repository name"),
    "token": ({"HUGGINGFACE_TOKEN": "hf_\u00e9"}, "HUGGINGFACE_TOKEN holds characters"),
    "device": ({"MODEL__DEVICE": "cuda", "MODEL__QUANTIZATION": "int8"}, "only a CPU runs"),
    # An address of the block for documentation (RFC 5737), which no machine has.
    "address": ({"APP__HOST": "192.0.2.1"}, "cannot listen on 192.0.2.1, port "),
    "host": ({"APP__HOST": "a..b"}, "cannot listen on a..b, port "),
    "production": ({"APP__ENVIRONMENT": "production", "SECURITY__API_KEY": "x"}, "openssl rand"),
}


@pytest.mark.parametrize(("settings", "fault"), BAD.values(), ids=BAD.keys())
def test_check_refuses_what_cannot_start(
    check: Check, settings: dict[str, str], fault: str
) -> None:
    """Patterns, paths, names, devices and addresses that cannot work are refused in one line."""
    status, line = check(**settings)
    assert (status, fault in line) == (1, True), line


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a CUDA device here")
def test_check_refuses_a_device_that_is_not_there(check: Check) -> None:
    """MODEL__DEVICE=cuda without a CUDA device is refused before a model is looked for."""
    assert check(MODEL__DEVICE="cuda")[0] == 1


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"{", "config.json is corrupt"),
        ("model.safetensors", None, "has no weights"),
        ("model.safetensors", b"cut", "is corrupt or truncated"),
        ("tokenizer.json", None, "a whole tokenizer.json is needed"),
        ("tokenizer.json", b"{}", "a whole tokenizer.json is needed"),
    ],
)
def test_check_refuses_an_incomplete_model(
    check: Check, model: Path, file: str, content: bytes | None, fault: str
) -> None:
    """A local model with a missing or broken file is refused with that file."""
    (model / file).unlink()
    if content is not None:
        (model / file).write_bytes(content)
    status, line = check(MODEL__SOURCE="local", MODEL__NAME=str(model))
    assert (status, fault in line) == (1, True), line


def test_check_refuses_an_engine_that_is_not_installed(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """model.engine openvino without its package is refused with the package's name."""
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    status, line = check(MODEL__ENGINE="openvino")
    assert status == 1
    assert "the package openvino-genai is not installed" in line


@pytest.mark.parametrize("source", ["hub", "bundled"])
def test_check_refuses_a_folder_of_models_that_cannot_be_written(
    tmp_path: Path, source: str
) -> None:
    """A model that must be downloaded to where no folder can be is refused with that path."""
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "app", "check"],
        cwd=PROJECT_ROOT,
        env=isolated_environment(
            {
                "HF_HOME": str(tmp_path / "file" / "home"),
                "MODEL__SOURCE": source,
                "MODEL__ENGINE": "auto",
            }
        ),
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 1
    assert f"since {tmp_path / 'file'} is no folder" in done.stderr.splitlines()[-1]


def test_check_may_run_beside_the_service(check: Check) -> None:
    """A port that is taken is no fault of the configuration: the service may be running."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        assert check(MODEL__ENGINE="echo", APP__HOST="127.0.0.1", APP__PORT=port)[0] == 0


def test_check_warns_as_the_start_does(
    check: Check, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a start warns of is in the output of `check`, which stays valid."""
    monkeypatch.setenv("MODEL_NAME", "a/b")
    for name, value in isolated_environment({}).items():
        monkeypatch.setenv(name, value)
    assert main(["check"]) == 0
    for handler in logging.getLogger().handlers:
        handler.flush()
    (line,) = capfd.readouterr().err.splitlines()
    assert "MODEL_NAME" in json.loads(line)["message"]


def test_the_command_has_a_name() -> None:
    """The project's command `llm-service` is the function that `python -m app` runs."""
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    target = project["project"]["scripts"]["llm-service"]
    assert EntryPoint("llm-service", target, "console_scripts").load() is main
