"""The servers that are compared, with their start and stop."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from app.core.config import Settings
from benchmarks import peers
from benchmarks.load.results import Outcome
from benchmarks.load.rounds import run_round
from benchmarks.load.targets import Route, Target
from benchmarks.load.transport import HttpClient
from benchmarks.load.workload import Lengths, Workload
from benchmarks.paths import LOGS, MODEL, ROOT
from benchmarks.vitals import processes_of

KEY = "benchmark-key-0123456789abcdef0123456789"
SYSTEM = "You are a helpful assistant."
START_SECONDS = 180.0
STOP_SECONDS = 20.0


@dataclass(frozen=True)
class Row:
    """A server of the comparison.

    Attributes:
        name: Name in the tables.
        command: Returns the command that starts it on a port.
        environment: Variables added to this process's environment.
        model: The model's name on OpenAI's routes.
    """

    name: str
    command: Callable[[int], Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    route: Route = Route.CHAT
    model: str = "default"
    is_ours: bool = True


def _uvicorn(port: int) -> list[str]:
    return [sys.executable, "-m", "uvicorn", "app.main:app", "--port", str(port)]


_OURS = {
    "MODEL__SOURCE": "bundled",
    "SECURITY__API_KEY": KEY,
    "SECURITY__MAX_PROMPT_CHARS": "1000000",
    "RATE_LIMIT__ENABLED": "false",
    "ENGINE__MAX_WAITING": "1024",
    "CACHE__ENABLED": "true",
    "LOGGING__LEVEL": "WARNING",
}

# Names in the tables, and the settings of the service for them.
ENGINES = {
    "openvino": {"MODEL__ENGINE": "openvino"},
    "transformers": {"MODEL__ENGINE": "transformers"},
    "vllm": {"MODEL__ENGINE": "vllm", "MODEL__SOURCE": "local", "MODEL__NAME": str(MODEL)},
}
SERVE = "transformers serve"
VLLM = "vllm serve"
LLAMA = "llama-server"


def ours(engine: str, device: str = "cpu", **settings: str) -> Row:
    """The row of this service with an engine."""
    environment = {**_OURS, **ENGINES[engine], "MODEL__DEVICE": device, **settings}
    if device == "cuda":
        environment |= {"MODEL__SOURCE": "local", "MODEL__NAME": str(MODEL)}
        environment |= {"ENGINE__MAX_RUNNING": "256"}
        environment.setdefault("MODEL__CUDA_MEMORY_SHARE", peers.MEMORY_SHARE[device])
        environment.setdefault("ENGINE__KV_CACHE_MEMORY_SHARE", peers.MEMORY_SHARE[device])
    return Row(f"ours, {engine}", _uvicorn, environment)


def all_rows(device: str, engines: Sequence[str] | None = None) -> list[Row]:
    """The rows of a device; the package of llama-server runs on CPUs only.

    On a CPU vLLM is measured only where it is named.
    """
    possible = ["transformers", "vllm"]
    if device == "cpu":
        possible = [engine for engine in ENGINES if engine != "vllm"]
    named = engines or possible
    rows = [ours(engine, device) for engine in named]
    if "vllm" in named:
        rows.append(
            Row(
                VLLM,
                lambda port: peers.vllm_serve(port, device),
                environment={"VLLM_NO_USAGE_STATS": "1"},
                route=Route.OPENAI_CHAT,
                model=str(MODEL),
                is_ours=False,
            )
        )
    rows.append(
        Row(
            SERVE,
            lambda port: peers.transformers_serve(port, device),
            route=Route.OPENAI_CHAT,
            model=str(MODEL),
            is_ours=False,
        )
    )
    if device == "cpu":
        rows.append(Row(LLAMA, peers.llama_server, route=Route.OPENAI_CHAT, is_ours=False))
    return rows


class StartError(Exception):
    """A server cannot be started; the message is one line."""


@dataclass
class Server:
    """A running server.

    Attributes:
        first_answer_seconds: Seconds from the start to the end of a first answer of one token.
        ready_seconds: Seconds from the start until ``/readyz`` succeeds; ``None`` for peers.
    """

    row: Row
    target: Target
    process: subprocess.Popen[bytes]
    first_answer_seconds: float = 0.0
    ready_seconds: float | None = None

    def memory(self) -> dict[str, float]:
        """Resident MiB by kind of process."""
        found: dict[str, float] = {}
        for process in processes_of(self.process.pid):
            label = process.label if self.row.is_ours else "server"
            found[label] = found.get(label, 0.0) + process.memory
        return found

    def stop(self) -> None:
        """Stop the server and all processes of its session."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def environment_of(row: Row) -> dict[str, str]:
    """This process's environment without settings of the service, with the row's variables."""
    sections = {name.upper() for name in Settings.model_fields}
    inherited = {k: v for k, v in os.environ.items() if k.partition("__")[0] not in sections}
    return {**inherited, **row.environment, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


def free_port() -> int:
    """A port of this machine that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _log_of(row: Row) -> Path:
    return LOGS / f"{row.name.replace(' ', '-').replace(',', '')}.log"


def spawn(row: Row, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a row's command in a new session; its output goes to the row's log."""
    LOGS.mkdir(parents=True, exist_ok=True)
    with _log_of(row).open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment_of(row),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # All processes that it starts can then be found and stopped.
            start_new_session=True,
        )


async def start(row: Row) -> Server:
    """Start a row's server and wait for its first answer.

    Raises:
        StartError: It ends, or is not ready in time.
    """
    port = free_port()
    try:
        command = row.command(port)
    except peers.PreparationError as error:
        raise StartError(str(error)) from None
    started = time.perf_counter()
    process = spawn(row, command)
    key = KEY if row.is_ours else ""
    target = Target(f"http://127.0.0.1:{port}", row.route, key, row.model, SYSTEM)
    server = Server(row, target, process)
    try:
        await _wait_for_answer(server, started, _log_of(row))
    except BaseException:
        server.stop()
        raise
    return server


async def _wait_for_answer(server: Server, started: float, log: Path) -> None:
    probe = HttpClient(server.target.base_url, time_limit=10)
    ready_path = "/readyz" if server.row.is_ours else "/health"
    while (await probe.get(ready_path)).status != 200:
        if server.process.poll() is not None:
            raise StartError(f"it ended: {_reason(log)}")
        if time.perf_counter() - started > START_SECONDS:
            raise StartError(f"it was not ready within {START_SECONDS:.0f} s")
        await asyncio.sleep(0.05)
    if server.row.is_ours:
        server.ready_seconds = time.perf_counter() - started
    probe.close()
    one_token = Workload(output_tokens=Lengths((1,)))
    first = await run_round(server.target, one_token, name="first", requests=1, clients=1)
    if first[0].outcome is not Outcome.COMPLETED:
        raise StartError(f"its first answer failed: {first[0].error}")
    server.first_answer_seconds = time.perf_counter() - started


def _reason(log: Path) -> str:
    """The last line of a log that is not empty; of a JSON line its message."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    for line in reversed([line.strip() for line in lines if line.strip()]):
        try:
            entry = msgspec.json.decode(line)
        except msgspec.DecodeError:
            entry = None
        return str(entry["message"] if isinstance(entry, dict) and "message" in entry else line)[
            :200
        ]
    return "it wrote nothing"
