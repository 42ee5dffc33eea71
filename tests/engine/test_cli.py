"""The command line: `check` refuses what cannot start, in one line, and nothing else."""

import contextlib
import json
import logging
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml

from app.cli import main
from app.core.config import PROJECT_ROOT
from app.core.config.security import SecuritySettings, digest_of
from tests.conftest import restored_logging
from tests.support.fake_hub import FakeHub
from tests.support.hub_processes import environment
from tests.support.service import isolated_environment
from tests.support.tiny_gguf import make_tiny_gguf
from tests.support.tiny_model import make_tiny_model

Check = Callable[..., tuple[int, str]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Check]:
    """Runs `check` with settings of the environment; returns its status and what it says."""

    def run(**settings: str) -> tuple[int, str]:
        for name, value in isolated_environment({"MODEL__ENGINE": "auto", **settings}).items():
            monkeypatch.setenv(name, value)
        status = main(["check"])
        said = capfd.readouterr()
        if status == 0:
            return status, said.out
        (line,) = said.err.splitlines()
        return status, line

    with restored_logging():
        yield run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model that tests may break."""
    return make_tiny_model(tmp_path / "model")


def test_check_says_what_a_start_would_do(check: Check, model: Path) -> None:
    """It names the model's size, the engine and why, threads, free memory and the address."""
    status, said = check(MODEL__SOURCE="local", MODEL__NAME=str(model), APP__PORT="8123")
    assert status == 0
    lines = dict(line.split(maxsplit=1) for line in said.splitlines())
    size = (model / "model.safetensors").stat().st_size
    assert lines["model"] == f"{model}: safetensors, {size / 1e6:.1f} MB"
    assert lines["engine"].startswith("transformers: model.engine is auto, and safetensors")
    assert "; weights are " in lines["engine"]
    assert re.fullmatch(r"cpu, \d+ threads", lines["device"])
    assert re.fullmatch(r"\d+\.\d GB free", lines["memory"])
    assert lines["address"].endswith(":8123")
    assert said.endswith(f"the configuration is valid: local {model} on cpu\n")


def test_check_says_why_openvino_is_not_taken(check: Check, tmp_path: Path) -> None:
    """A GGUF file that OpenVINO would misread is planned for transformers, as a start does it."""
    model = make_tiny_gguf(tmp_path / "model.gguf")
    model.write_bytes(model.read_bytes().replace(b"llama.context_length", b"llama.contexts_other"))
    status, said = check(MODEL__SOURCE="local", MODEL__NAME=str(model))
    assert status == 0
    assert "transformers: model.engine is auto, but OpenVINO cannot run" in said
    assert check(MODEL__SOURCE="local", MODEL__NAME=str(model), MODEL__ENGINE="openvino")[0] == 1


def test_check_of_a_model_that_is_not_here(check: Check) -> None:
    """A model of the hub is not looked up: the output says how it is fetched."""
    status, said = check(MODEL__NAME="owner/name")
    assert (status, "owner/name: a start fetches it if" in said) == (0, True)
    assert "engine   not known yet: the model's files decide" in said


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
    check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    """A model that must be downloaded to where no folder can be is refused with that path."""
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "home"
    # The library has read the variable already.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    status, line = check(HF_HOME=str(home), MODEL__SOURCE=source)
    assert (status, f"since {tmp_path / 'file'} is no folder" in line) == (1, True), line


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


def test_pull_fetches_a_model(hub: FakeHub, tmp_path: Path, tiny_model_dir: Path) -> None:
    """`pull` names the folder of the model's files, and one line what is wrong with the name."""
    repo = hub.add("tiny/pulled", tiny_model_dir)
    # One process for both, as an import of the library takes a second.
    program = "import sys, app.cli; print([app.cli.main(['pull', name]) for name in sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-c", program, "tiny/pulled", "tiny/absent"],
        cwd=PROJECT_ROOT,
        env=environment(hub.url, tmp_path),
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    folder, statuses = done.stdout.splitlines()
    assert statuses == "[0, 1]"
    assert (Path(folder) / "config.json").read_bytes() == repo.files["config.json"]
    *logged, refused = done.stderr.splitlines()
    first, *_, last, second = (json.loads(line)["message"] for line in logged)
    assert first == "looking up tiny/pulled on the hub"
    assert last.startswith("tiny/pulled is here: ")
    assert second == "looking up tiny/absent on the hub"
    assert refused.startswith("tiny/absent is not on the hub")


def test_a_new_key_fits_its_entry(capsys: pytest.CaptureFixture[str]) -> None:
    """`keys new` prints a strong key, and an entry that config.yml takes for that key."""
    assert main(["keys", "new", "--name", "reporting"]) == 0
    said = capsys.readouterr().out
    key = re.findall(r"^  ([0-9a-f]{64})$", said, re.MULTILINE)[0]
    entries = yaml.safe_load(said[said.index("security:") :])["security"]["api_keys"]
    (entry,) = SecuritySettings(api_keys=entries).api_keys
    assert (entry.name, entry.sha256) == ("reporting", digest_of(key))


def test_a_bad_name_of_a_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """`keys new` makes no key where config.yml would not take its name."""
    assert main(["keys", "new", "--name", "a b"]) == 1
    said = capsys.readouterr()
    assert (said.out, "'a b' is no name of a key" in said.err) == ("", True)


def test_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` of each command shows an example of it."""
    for command in ("serve", "chat", "check", "pull", "keys new"):
        with pytest.raises(SystemExit) as ended:
            main([*command.split(), "--help"])
        assert ended.value.code == 0
        assert f"llm-service {command}" in capsys.readouterr().out.partition("example:")[2]


def test_the_command_has_a_name() -> None:
    """The project's command `llm-service` is the function that `python -m app` runs."""
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    target = project["project"]["scripts"]["llm-service"]
    assert EntryPoint("llm-service", target, "console_scripts").load() is main
