"""Two copies of the service behind a real HAProxy with the configuration of deploy/."""

import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from app.core.config import PROJECT_ROOT
from tests.support.service import Service, running_service

CONFIG = PROJECT_ROOT / "deploy" / "haproxy" / "haproxy.cfg"

needs_haproxy = pytest.mark.skipif(
    not shutil.which("haproxy"), reason="needs HAProxy (Debian's package haproxy)"
)


class Replica:
    """A copy of the service, on a port that a restart keeps.

    Attributes:
        service: The one that runs, or ran until it was killed.
    """

    def __init__(self, **settings: str) -> None:
        self._settings = settings
        self._running = ExitStack()
        self.service = self._start(port="0")

    def restart(self) -> None:
        """End it with SIGTERM, assert that it ended well, and start it again."""
        self.close()
        self.service = self._start(port=self.service.base_url.rpartition(":")[2])

    def close(self) -> None:
        """End it with SIGTERM, and assert that it ended well."""
        self._running.close()

    def _start(self, port: str) -> Service:
        command = ("uvicorn", "app.main:app", "--port", port)
        return self._running.enter_context(running_service(command=command, **self._settings))


@contextmanager
def balanced(replicas: Sequence[Replica]) -> Iterator[Service]:
    """HAProxy before these copies, as if it were one service."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config, log_path = Path(folder) / "haproxy.cfg", Path(folder) / "haproxy.log"
        config.write_text(_configuration(port, replicas), encoding="utf-8")
        with log_path.open("wb") as log:
            process = subprocess.Popen(["haproxy", "-db", "-f", config], stdout=log, stderr=log)
        try:
            balancer = Service(f"http://127.0.0.1:{port}", process, log_path)
            balancer.wait_for(lambda: _answers(balancer), "an answer of HAProxy")
            yield balancer
        finally:
            process.terminate()
            process.wait(10)


def _configuration(port: int, replicas: Sequence[Replica]) -> str:
    """The configuration of deploy/, with these copies in place of Compose's names."""
    text = CONFIG.read_text(encoding="utf-8")
    servers = "".join(
        f"    server copy{number} {replica.service.base_url.removeprefix('http://')} check\n"
        for number, replica in enumerate(replicas)
    )
    for pattern, new in (
        (r"resolvers compose\n(?: .*\n)+", ""),
        (r"bind :8000\n", f"bind 127.0.0.1:{port}\n"),
        (r" +server-template .*\n", servers),
    ):
        text, count = re.subn(pattern, new, text)
        assert count == 1, pattern
    return text


def _answers(balancer: Service) -> bool:
    try:
        return balancer.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False
