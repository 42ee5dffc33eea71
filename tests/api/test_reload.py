"""`uvicorn … --reload`: a service that cannot start says so, and starts once that is mended."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from app.api.reloaded import ReloadedApplication
from app.core.config import PROJECT_ROOT
from app.core.logging import get_logger
from app.main import create_app
from tests.support.service import isolated_environment, session_members, setting_names
from tests.support.settings import Load

SECONDS = 100.0
NO_MODEL = "MODEL__ENGINE=auto\nMODEL__SOURCE=local\nMODEL__NAME=/nowhere\n"
WORKS = "MODEL__ENGINE=echo\n"


@dataclass
class Reloader:
    """A copy of the project under uvicorn's reloader."""

    folder: Path
    url: str

    def edit(self, env: str) -> None:
        """Write the .env."""
        (self.folder / ".env").write_text(env, encoding="utf-8")

    @property
    def log(self) -> str:
        """Everything it wrote."""
        return (self.folder / "log").read_text(encoding="utf-8")

    def wait_for_line(self, part: str) -> None:
        """Wait until this is in the log, which a thread writes."""
        deadline = time.monotonic() + SECONDS
        while part not in self.log:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)

    def wait_for(self, status: int, part: str) -> httpx.Response:
        """Wait until /health answers so."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                response = httpx.get(f"{self.url}/health", trust_env=False, timeout=5)
                if response.status_code == status and part in response.text:
                    return response
            except httpx.TransportError:
                # Between two children nothing answers; the deadline ends that.
                pass
            time.sleep(0.1)
        raise AssertionError(f"no {status} with {part!r}:\n{self.log}")


@pytest.fixture
def reloader(tmp_path: Path) -> Iterator[Reloader]:
    """The document's command in a copy of the project whose .env names a missing model."""
    shutil.copytree(PROJECT_ROOT / "app", tmp_path / "app")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = Reloader(tmp_path, f"http://127.0.0.1:{port}")
    started.edit(NO_MODEL)
    # The settings are those of the copy's .env alone.
    unset = dict.fromkeys((*setting_names(), "CONFIG_FILE"), "")
    command = f"uvicorn app.main:app --host 0.0.0.0 --port {port} --reload"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command.split()],
            cwd=tmp_path,
            env=isolated_environment({}) | unset,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield started
        process.terminate()
        assert process.wait(30) == 0, started.log
        deadline = time.monotonic() + 30
        # multiprocessing's resource tracker ends a moment after the reloader that it watched.
        while members := session_members(process.pid):
            assert time.monotonic() < deadline, members
            time.sleep(0.05)
    finally:
        if session_members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_failed_start_answers_503_until_it_is_mended(reloader: Reloader) -> None:
    """A missing model is 503 with its line; once it is mended, the log has the address."""
    fault = "/nowhere does not exist"
    assert fault in reloader.wait_for(503, fault).json()["error"]["message"]
    reloader.wait_for_line(fault)
    reloader.edit(WORKS)
    reloader.wait_for(200, '"healthy"')
    address = reloader.url.replace("127.0.0.1", "localhost")
    reloader.wait_for_line(f"ready for requests at {address}/ (open it for")


def test_a_wrong_setting_is_503_with_its_line(
    load: Load, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the reloader a setting that cannot work is the answer to each request."""
    monkeypatch.setattr(get_logger(), "handlers", [caplog.handler])
    app = ReloadedApplication(
        lambda fail: create_app(load(env="CACHE__SIZE=many"), on_fatal=fail), []
    )
    with TestClient(app) as client:
        response = client.get("/health")
    error = response.json()["error"]
    assert response.status_code == 503
    assert "cache.size = 'many'" in error["message"]
    assert error["message"] in caplog.text
    assert error["request_id"].startswith("req-")
