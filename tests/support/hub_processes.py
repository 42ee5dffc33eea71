"""Processes that download models: the download alone, and the engine process."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from app.core.config import PROJECT_ROOT, ModelSettings
from app.llm.protocol import (
    HEADER_BYTES,
    Configure,
    Report,
    Stop,
    Submit,
    body_length,
    pack,
    unpack_report,
)

GOOD_TOKEN = "hf_canaryGoodTokenThatNoLogMayShow"
OTHER_TOKEN = "hf_canaryOtherTokenThatNoLogMayShow"
UNKNOWN_TOKEN = "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"
DEFAULT_MODEL = "google/gemma-2-2b-it"

# The library writes chunks of this size; a broken connection loses less than one chunk.
PIECE = constants.DOWNLOAD_CHUNK_SIZE
LARGE = {"config.json": b"{}", "large.gguf": random.Random(0).randbytes(2 * PIECE + 5000)}

# Reads calls of app.llm.models.hub.download from standard input, one per line, and answers each.
CHILD = """
import json, logging, sys
logging.basicConfig(level=logging.DEBUG)
from app.llm.models import hub, progress
from app.utils.errors import ModelLoadError
progress.PROGRESS_SECONDS = 0
for line in sys.stdin:
    said = []
    try:
        found = hub.download(
            **json.loads(line),
            progress=lambda message, percent=None: said.append(message),
        )
        answer = {
            "directory": str(found.directory),
            "gguf": found.gguf,
            "openvino": found.is_openvino,
            "revision": found.revision,
        }
    except ModelLoadError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer | {"said": said}), flush=True)
"""


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """The environment of this process, with another hub and another cache."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "MODEL__", "SECURITY__", "TRANSFORMERS_"))
    }
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_ETAG_TIMEOUT": "1"}
    local = "127.0.0.1,localhost"
    direct = {"NO_PROXY": local, "no_proxy": local, "HF_HUB_DISABLE_XET": "1"}
    return kept | hub | direct | more


class Downloader:
    """A process that runs ``app.llm.models.hub.download`` on request."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def log(self) -> str:
        """The log of the process, at level DEBUG."""
        return self._log.read_text()

    def download(
        self,
        name: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        openvino: bool = False,
    ) -> dict[str, Any]:
        """Call it once; returns the snapshot or the one-line error, and the reports of progress."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        call = {"name": name, "revision": revision, "token": token, "openvino": openvino}
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "\n" not in answer.get("error", "")
        for secret in (GOOD_TOKEN, OTHER_TOKEN, UNKNOWN_TOKEN):
            assert secret not in json.dumps(answer)
        return answer


@contextmanager
def downloader(home: Path, endpoint: str, **env: str) -> Iterator[Downloader]:
    """Run a :class:`Downloader` with its cache under ``home``."""
    home.mkdir(parents=True, exist_ok=True)
    path = home / "log.txt"
    with (
        path.open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=PROJECT_ROOT,
            env=environment(endpoint, home, **env),
        ) as process,
    ):
        # The end of the block closes standard input, which ends the child.
        yield Downloader(process, path)


class Worker:
    """The engine process, driven over its socket in the service's place."""

    def __init__(self, env: dict[str, str], log: Path, model: ModelSettings) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(60)
        self._log = log
        with theirs, log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app.llm.engine.worker", str(theirs.fileno()), "2"],
                pass_fds=(theirs.fileno(),),
                stderr=file,
                cwd=PROJECT_ROOT,
                env=env,
            )
        self.send(
            Configure(
                model=model.model_dump(),
                max_running=2,
                echo_step_seconds=0,
                huggingface_token=GOOD_TOKEN,
                log_level="DEBUG",
                log_format="json",
            )
        )

    def send(self, message: Submit | Stop | Configure) -> None:
        """Send one command."""
        self._socket.sendall(pack(message))

    def receive(self) -> Report:
        """Wait for one report."""
        return unpack_report(self._read(body_length(self._read(HEADER_BYTES))))

    def _read(self, count: int) -> bytes:
        received = b""
        while len(received) < count:
            piece = self._socket.recv(count - len(received))
            assert piece, f"the worker has ended: {self._log.read_text()}"
            received += piece
        return received

    def wait(self) -> int:
        """Wait until the process exits, and return its code."""
        code = self._process.wait(10)
        self._socket.close()
        return code

    def close(self) -> None:
        """End the process if it is running."""
        self._socket.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        self._process.wait()

    def logged(self) -> list[dict[str, Any]]:
        """The log, each line of which must be a JSON object."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]
