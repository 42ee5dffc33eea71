"""What leaves the machine: nothing, unless a setting asks for it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.fake_hub import running_hub
from tests.support.service import Service, running_service
from tests.support.tiny_gguf import make_tiny_gguf

CANARY = "canary-7d1c"
CHAT = {"messages": [{"role": "user", "content": CANARY}], "max_tokens": 8, "cache": False}

# Python imports it in every process of the service. It tells of each process, and of each address
# that the process looks up or connects to.
WATCH = """
import os, sys

def tell(line):
    with open(os.environ["OUTGOING"], "a") as file:
        file.write(line + "\\n")

def watch(event, arguments):
    if event == "socket.getaddrinfo":
        tell(f"address {arguments[0]}")
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        tell(f"address {arguments[1][0]}")

tell("process " + " ".join(sys.orig_argv[1:4]))
sys.addaudithook(watch)
"""


class Collector(ThreadingHTTPServer):
    """A server in LangSmith's place.

    Attributes:
        received: The bodies of all requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[bytes] = []


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_GET(self) -> None:
        """Accept it."""
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.received.append(body)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_PATCH = do_GET  # noqa: N815 - the names of the interface

    def log_message(self, *_: object) -> None:
        """Keep the tests' output clean."""


@contextmanager
def traced_service(*, allowed: bool) -> Iterator[tuple[Service, Collector]]:
    """A service whose environment asks for LangSmith's tracing, and the place where it would go."""
    collector = Collector()
    threading.Thread(target=collector.serve_forever, args=(0.01,), daemon=True).start()
    try:
        with running_service(
            # LangChain reads the environment once: without permission, as in production.
            interpreter="forked" if allowed else "new",
            TRACING__LANGSMITH=str(allowed).lower(),
            LANGSMITH_TRACING="true",
            LANGCHAIN_TRACING_V2="true",
            LANGCHAIN_TRACING="true",
            LANGSMITH_ENDPOINT=f"http://127.0.0.1:{collector.server_address[1]}",
            LANGSMITH_API_KEY="a-key",
            LANGSMITH_DISABLE_RUN_COMPRESSION="true",
        ) as service:
            yield service, collector
    finally:
        collector.shutdown()
        collector.server_close()


def ask(service: Service) -> None:
    """Ask with the canary; the echo engine repeats it."""
    with service.client() as client:
        response = client.post("/v1/chat", json=CHAT)
        assert response.status_code == 200, response.text


def test_the_environment_alone_traces_nothing() -> None:
    """Variables of LangSmith in the environment send nothing away, and fail no request."""
    with traced_service(allowed=False) as (service, collector):
        ask(service)
        assert service.terminate() == 0
        assert collector.received == []
        assert "LangSmith" not in service.raw_log()


def test_the_setting_allows_tracing_and_the_log_says_so() -> None:
    """With tracing.langsmith the same environment sends the prompt, and the start warns of it."""
    with traced_service(allowed=True) as (service, collector):
        ask(service)
        service.wait_for(
            lambda: any(CANARY.encode() in body for body in collector.received), "the trace"
        )
        (line,) = service.lines(lambda e: e["message"].startswith("tracing.langsmith"))
        assert line["level"] == "WARNING"


@pytest.mark.parametrize(
    "engine", ["openvino", pytest.param("transformers", marks=pytest.mark.full_size)]
)
def test_no_process_asks_for_an_address(engine: str, tmp_path: Path) -> None:
    """Loading a model from the disk and answering with it looks up and connects to no address."""
    (tmp_path / "sitecustomize.py").write_text(WATCH, encoding="utf-8")
    outgoing = tmp_path / "outgoing"
    with running_service(
        interpreter="new",
        MODEL__SOURCE="local",
        MODEL__NAME=str(make_tiny_gguf(tmp_path / "tiny.gguf")),
        MODEL__ENGINE=engine,
        PYTHONPATH=str(tmp_path),
        OUTGOING=str(outgoing),
    ) as service:
        with service.client() as client:
            assert client.post("/v1/chat", json=CHAT).status_code == 200
        assert service.terminate() == 0
    lines = outgoing.read_text(encoding="utf-8").splitlines()
    processes = [line for line in lines if line.startswith("process ")]
    for name in ("uvicorn", "app.llm.engine.worker"):
        assert any(name in process for process in processes)
    assert set(lines) - set(processes) <= {"address 127.0.0.1"}


def test_the_hub_is_asked_for_the_model_and_told_nothing(tmp_path: Path) -> None:
    """A download's requests do not tell what is installed, or under which tool the service runs."""
    with running_hub() as hub:
        hub.faults.silent = True
        with running_service(
            until="listening",
            MODEL__ENGINE="transformers",
            MODEL__NAME="owner/model",
            HF_ENDPOINT=hub.url,
            HF_HOME=str(tmp_path),
        ) as service:
            service.wait_for(lambda: hub.requests, "a request to the hub")
    for request in hub.requests:
        assert "hf_hub/" in request.user_agent
        assert "torch/" not in request.user_agent
        assert "agent/" not in request.user_agent
