"""Which interpreter runs the engine process, and what is said where it cannot."""

import sys
from pathlib import Path
from typing import Any

import pytest

from app.core.config import ModelSettings
from app.core.config.engine import EngineSettings
from app.llm import loader
from app.llm.client.process import VLLM_PYTHON, engine_python
from app.llm.models.snapshot import Snapshot
from app.utils.errors import ConfigurationError, ModelLoadError
from tests.support.backends import (
    load,
    load_local,
    need_vllm,
    request,
    run,
    settings_of,
)
from tests.support.engine import EchoEngine
from tests.support.remote_backend import RemoteBackend
from tests.support.service import UVICORN, running_service
from tests.support.tiny_gguf import make_tiny_gguf

OTHER = "/usr/bin/env"


def load_here(settings: ModelSettings) -> None:
    """Load a model in this process, whose environment has no vLLM."""
    loader.load_backend(
        settings, max_running=2, echo_step_seconds=0, token=None, progress=lambda *_: None
    )


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of vLLM's interpreter, where a test may put one."""
    path = tmp_path / "python"
    monkeypatch.setattr("app.llm.client.process.VLLM_PYTHON", path)
    return path


def chosen(engine: str = "auto", python: str | None = None, **model: Any) -> str:
    """The interpreter for settings."""
    return engine_python(ModelSettings(engine=engine, **model), EngineSettings(python=python))


def test_vllm_has_its_own(vllm: Path) -> None:
    """On a GPU auto takes vLLM where it is installed and may read the model, else the service's."""
    assert chosen(device="cuda") == sys.executable
    vllm.touch()
    assert [chosen("vllm"), chosen(device="cuda")] == [str(vllm)] * 2
    assert chosen(device="cpu") == chosen("transformers", device="cuda") == sys.executable
    assert chosen(device="cuda", name="owner/name/model.Q4_1.GGUF") == sys.executable
    assert chosen(device="cuda", source="bundled") == sys.executable
    assert chosen("vllm", OTHER) == chosen("echo", OTHER) == OTHER


def test_a_missing_one_is_named(vllm: Path) -> None:
    """Where there is none, the start fails with a line that says what to do."""
    for engine, python in (("vllm", None), ("auto", "/no/python")):
        with pytest.raises(ConfigurationError, match="make install-vllm, or set ENGINE__PYTHON"):
            chosen(engine, python)


def test_the_service_ends_with_one_line_without_it() -> None:
    """`llm-service check` and uvicorn write the line and end with a status that is not zero."""
    for command in (("app", "check"), UVICORN):
        with running_service(
            until="started", command=command, ENGINE__PYTHON="/no/python"
        ) as service:
            assert service.wait() > 0
            (line,) = service.raw_log().strip().splitlines()[-1:]
        assert "engine.python is /no/python, which is no program" in line


async def test_a_broken_environment_is_named(tmp_path: Path) -> None:
    """An interpreter without the packages ends the service; its last words are in the line."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named msgspec' >&2\nexit 1\n")
    python.chmod(0o700)
    engine = EchoEngine(python=str(python))
    await engine.client.start()
    try:
        assert "exit code 1 (No module named msgspec)" in await engine.ended()
    finally:
        await engine.client.stop()


def test_an_interpreter_without_vllm_is_named(tiny_model_dir: Path) -> None:
    """Without vLLM the load fails with a line that says how it is installed."""
    settings = ModelSettings(source="local", name=str(tiny_model_dir), engine="vllm")
    with pytest.raises(ModelLoadError, match=r"vLLM cannot be imported .*: run make install-vllm"):
        load_here(settings)


def test_auto_takes_vllm_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path) -> None:
    """It does so in an interpreter that has vLLM, for safetensors, and the reason is given."""
    reasons: list[str] = []

    def told(_: ModelSettings, __: Snapshot, reason: str, *___: Any, **____: Any) -> None:
        reasons.append(reason)
        raise ModelLoadError("seen")

    monkeypatch.setattr(loader, "check_device", lambda _: None)
    monkeypatch.setattr(loader, "load_vllm", told)
    monkeypatch.setattr(loader, "load_transformers", told)
    for found in (None, object()):
        monkeypatch.setattr(loader, "find_spec", lambda _, found=found: found)
        with pytest.raises(ModelLoadError, match="seen"):
            load_local(tiny_model_dir, device="cuda", engine="auto")
    assert "vLLM is not installed" in reasons[0]
    assert reasons[1] == "model.engine is auto, and vLLM is the fastest on a GPU"


def test_what_vllm_cannot_run_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    """GGUF files and the service's own 8-bit layers are refused with a line that says why."""
    gguf = make_tiny_gguf(tmp_path / "model.gguf")
    for model, fields, why in (
        (gguf, {}, "vllm, which reads safetensors"),
        (tiny_model_dir, {"quantization": "int8"}, "int8, which only transformers computes"),
    ):
        settings = ModelSettings(engine="vllm", source="local", name=str(model), **fields)
        with pytest.raises(ModelLoadError, match=why):
            loader.check_model(settings, max_running=2, token=None)


@pytest.mark.vllm
def test_vllms_cache_has_room_for_a_whole_context(tiny_model_dir: Path) -> None:
    """A request may fill the context where the cache is no larger, as with a long context."""
    need_vllm()
    backend = load(settings_of("vllm", tiny_model_dir), max_running=1)
    room = backend.info.context_length - 4
    answer = run(backend, request("a", [5] * 4, max_tokens=room))["a"]
    assert answer[-1].finish_reason in ("length", "stop")


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"enforce_eagr": True}, "none of this vLLM's arguments; did you mean enforce_eager?"),
        ({"trust_remote_code": True}, "may not set trust_remote_code"),
        ({"max_model_len": 10**6}, "vLLM cannot run .*max_model_len"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, Any], line: str, tiny_model_dir: Path
) -> None:
    """An argument that vLLM does not know, or the service decides, ends the load with one line."""
    need_vllm()
    settings = settings_of("vllm", tiny_model_dir)
    with pytest.raises(RuntimeError, match=line):
        RemoteBackend(str(VLLM_PYTHON), settings, 2, **arguments)
