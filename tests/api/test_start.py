"""Signals at every moment of the start: sent to the whole process group, as by Ctrl-C."""

import os
import re
import signal
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.service import SERVE, START_SECONDS, Service, running_service

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="the kernel does not say how far a process is"
)


def about(service: Service, file: str) -> str:
    """What the kernel says about the service's process; nothing once it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{service.process.pid}/{file}").read_text()
    return ""


def handles_signals(service: Service) -> bool:
    """Whether SIGTERM is handled; Python itself handles SIGINT only."""
    found = re.search(r"SigCgt:\s*(\w+)", about(service, "status"))
    return found is not None and bool(int(found[1], 16) >> (signal.SIGTERM - 1) & 1)


def runs(program: str) -> Callable[[Service], bool]:
    """Whether a process of the service has this in its command line."""
    return lambda service: any(program in line for line in service.survivors())


def logs(text: str) -> Callable[[Service], bool]:
    """Whether the log has this text."""
    return lambda service: text in service.raw_log()


# Before uvicorn handles signals there is nothing to drain.
EARLY = {
    "its first lines": handles_signals,
    "the imports": lambda service: "pydantic_core" in about(service, "maps"),
}
LATE = {
    "the engine process' start": runs("app.llm.engine.worker"),
    "the engine process' imports": logs("engine process started"),
    "the description": logs("model loaded"),
}


def interrupted(
    service: Service, reached: Callable[[Service], bool], number: signal.Signals
) -> int:
    """Send the signal when the start has come that far; returns the exit status."""
    service.wait_for(lambda: reached(service), "the moment", START_SECONDS)
    os.killpg(service.process.pid, number)
    status = service.wait()
    assert "Traceback" not in service.raw_log()
    assert service.raw_log().count("engine process started") <= 1
    return status


def at(moments: Iterable[str]) -> pytest.MarkDecorator:
    """Each moment with one of the signals in turn; `make test-full` takes each with both."""
    signals = (signal.SIGINT, signal.SIGTERM)
    return pytest.mark.parametrize(
        ("moment", "number"),
        [
            pytest.param(
                moment,
                number,
                marks=[] if (place + turn) % 2 == 0 else [pytest.mark.full_size],
            )
            for place, moment in enumerate(moments)
            for turn, number in enumerate(signals)
        ],
    )


@at(EARLY)
def test_a_signal_before_the_service_exists_ends_the_start(
    moment: str, number: signal.Signals
) -> None:
    """The status says which signal, there is no traceback, and nothing is left."""
    with running_service(until="started", interpreter="new", command=SERVE) as service:
        assert interrupted(service, EARLY[moment], number) == 128 + number


@at(LATE)
def test_a_signal_during_the_start_ends_the_service(moment: str, number: signal.Signals) -> None:
    """The status is 0, no second engine process is started, and nothing is left."""
    with running_service(until="started") as service:
        assert interrupted(service, LATE[moment], number) == 0


def test_a_signal_during_a_download_ends_it(tmp_path: Path) -> None:
    """The process that downloads the bundled model is not left, nor a half of the model."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        running_service(
            until="started",
            MODEL__ENGINE="auto",
            MODEL__SOURCE="bundled",
            HF_HOME=str(tmp_path),
            PIP_INDEX_URL=f"http://127.0.0.1:{silent.getsockname()[1]}/simple",
        ) as service,
    ):
        assert interrupted(service, runs("--require-hashes"), signal.SIGINT) == 0
    assert not [*tmp_path.rglob("*.gguf")]
