"""The engine process and the service with a model from the hub, or without one."""

from pathlib import Path

import pytest

from app.core.config import ModelSettings
from app.llm.protocol import (
    GenerationRequest,
    Loaded,
    LoadFailed,
    Loading,
    Ready,
    SamplingParams,
    Step,
    Stop,
    Submit,
)
from app.main import EXIT_STARTUP_FAILED
from tests.support.fake_hub import FakeHub, Faults
from tests.support.hub_processes import DEFAULT_MODEL, GOOD_TOKEN, OTHER_TOKEN, Worker, environment
from tests.support.service import API_KEY, running_service


def test_a_model_from_the_hub_generates(hub: FakeHub, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The engine process downloads over a cut connection, loads, generates, and logs only JSON."""
    repo = hub.add("tiny/gated", tiny_model_dir, gated=True)
    hub.faults = Faults(cut_after=[100_000])
    model = ModelSettings(
        name="tiny/gated", source="hub", engine="transformers", device="cpu", dtype="float32"
    )
    worker = Worker(environment(hub.url, tmp_path), tmp_path / "log.txt", model)
    try:
        said = []
        while isinstance(report := worker.receive(), Loading):
            said.append(report.message)
        assert isinstance(report, Loaded), report
        assert (report.info.model, report.info.revision) == ("tiny/gated", repo.sha)
        assert (report.info.backend, report.info.device) == ("transformers", "cpu")
        assert isinstance(worker.receive(), Ready)
        sampling = SamplingParams(temperature=0)
        worker.send(
            Submit(GenerationRequest("r", prompt_token_ids=[5], max_tokens=4, sampling=sampling))
        )
        tokens: list[int] = []
        finish = None
        while finish is None:
            report = worker.receive()
            assert isinstance(report, Step)
            for event in report.events:
                tokens += event.token_ids
                finish = event.finish_reason
        worker.send(Stop())
        assert (len(tokens), finish, worker.wait()) == (4, "length", 0)
    finally:
        worker.close()
    assert said[-2:] == ["loading tiny/gated with transformers", "starting continuous batching"]
    assert {line["level"] for line in worker.logged()} <= {"INFO", "WARNING"}
    assert GOOD_TOKEN not in (tmp_path / "log.txt").read_text()
    # Loading asks the hub for nothing but the download.
    assert set(hub.downloads("tiny/gated")) == set(repo.files)


def test_the_engine_process_exits_without_its_model(hub: FakeHub, tmp_path: Path) -> None:
    """A model that cannot be loaded is reported in one line, and the process exits with 1."""
    model = ModelSettings(name="tiny/missing", engine="transformers")
    worker = Worker(environment(hub.url, tmp_path), tmp_path / "log.txt", model)
    try:
        while isinstance(report := worker.receive(), Loading):
            pass
        assert isinstance(report, LoadFailed)
        assert report.message.startswith("tiny/missing is not on the hub")
        assert worker.wait() == 1
    finally:
        worker.close()
    assert worker.logged() == []


@pytest.mark.parametrize(
    ("token", "hint"), [(" ", "set HUGGINGFACE_TOKEN"), (OTHER_TOKEN, "may not read it")]
)
def test_the_service_exits_with_one_line(
    hub: FakeHub, tiny_model_dir: Path, tmp_path: Path, token: str, hint: str
) -> None:
    """Without access to the default model the service exits with one line, without the token."""
    hub.add(DEFAULT_MODEL, tiny_model_dir, gated=True)
    with running_service(
        until="started",
        MODEL__ENGINE="auto",
        MODEL__NAME=DEFAULT_MODEL,
        HUGGINGFACE_TOKEN=token,
        HF_ENDPOINT=hub.url,
        HF_HOME=str(tmp_path),
    ) as service:
        assert service.wait() == EXIT_STARTUP_FAILED
        fatal = [line for line in service.log() if line["level"] in ("ERROR", "CRITICAL")]
        output = service.raw_log()
    assert [line["level"] for line in fatal] == ["CRITICAL"]
    assert fatal[0]["message"].startswith(f"{DEFAULT_MODEL} is a gated model; ")
    assert hint in fatal[0]["message"]
    assert "MODEL__SOURCE=bundled" in fatal[0]["message"]
    for secret in ("Traceback", OTHER_TOKEN, API_KEY):
        assert secret not in output
