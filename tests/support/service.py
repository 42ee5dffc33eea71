"""Runs the service as in production: uvicorn in a process, over real sockets."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, SecretStr

from app.core.config import PROJECT_ROOT, Settings
from tests.support.forked import ForkedProcess

API_KEY = "test-key-of-the-first-caller-0123456789"
OTHER_KEY = "test-key-of-the-other-caller-9876543210"

# A start imports FastAPI and LangChain, which takes long on a busy machine.
START_SECONDS = 100.0
STOP_SECONDS = 30.0

# Port 0 takes a free one, which the log then names.
UVICORN = ("uvicorn", "app.main:app", "--port", "0")
SERVE = ("app", "serve")

AnyProcess = subprocess.Popen[bytes] | ForkedProcess

_LISTENING = re.compile(r"Uvicorn running on (http://[\w.:]+)")


def setting_names() -> dict[str, Any]:
    """Every environment variable that is a setting, with the setting's default."""
    names: dict[str, Any] = {}
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, BaseModel):
            section = type(field.default).model_fields
            names |= {
                f"{name}__{key}".upper(): f.get_default(call_default_factory=True)
                for key, f in section.items()
            }
        else:
            names[name.upper()] = field.default
    return names


def is_setting(variable: str) -> bool:
    """Whether the settings would read an environment variable of this name."""
    section = variable.partition("__")[0].lower()
    return section in Settings.model_fields or variable.upper() in ("CONFIG_FILE", "HF_TOKEN")


def isolated_environment(settings: Mapping[str, str | None]) -> dict[str, str]:
    """This process's environment, with every setting in it: the given value, else the default.

    A setting that is given as ``None`` is left to the other sources. The environment wins over
    .env, so a developer's .env has no effect.
    """
    inherited = {k: v for k, v in os.environ.items() if not is_setting(k)}
    # An empty variable would leave the setting to .env; these values have the effect of None.
    absent = {"MODEL__REVISION": "main", "HUGGINGFACE_TOKEN": " "}
    defaults = {
        name: _as_variable(value) for name, value in setting_names().items() if value is not None
    }
    chosen: dict[str, str | None] = {
        **defaults,
        **absent,
        "CONFIG_FILE": str(PROJECT_ROOT / "config.yml"),
        "MODEL__ENGINE": "echo",
        "SECURITY__API_KEY": API_KEY,
        "SECURITY__API_KEYS": json.dumps([{"name": "other", "key": OTHER_KEY}]),
        "RATE_LIMIT__ENABLED": "false",
        # There is no balancer that needs time to notice the end.
        "APP__SHUTDOWN_NOTICE_SECONDS": "0",
        **settings,
    }
    chosen.setdefault("RATE_LIMIT__BURST_SIZE", chosen["RATE_LIMIT__REQUESTS_PER_MINUTE"])
    return {**inherited, **{name: value for name, value in chosen.items() if value is not None}}


def _as_variable(value: Any) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return value if isinstance(value, str) else json.dumps(value)


@dataclass
class Service:
    """A running service.

    Attributes:
        base_url: Where it listens.
        process: The API process.
        log_path: Standard output and error of the service and its engine process.
        log_is_read: Cleared, nobody reads the pipe of a service that was started with one.
    """

    base_url: str
    process: AnyProcess
    log_path: Path
    log_is_read: threading.Event = dataclasses.field(default_factory=threading.Event)

    def client(self, key: str | None = API_KEY, **kwargs: Any) -> httpx.Client:
        """A client that sends ``key``; proxies of the environment are not used."""
        headers = {**({"X-API-Key": key} if key else {}), **kwargs.pop("headers", {})}
        # The service speaks plain HTTP, and reading certificates takes 35 ms.
        options: dict[str, Any] = {"timeout": 60.0, "trust_env": False, "verify": False, **kwargs}
        return httpx.Client(base_url=self.base_url, headers=headers, **options)

    def get(self, path: str) -> httpx.Response:
        """GET without a key, on a connection of its own."""
        with self.client(key=None) as client:
            return client.get(path)

    def raw_log(self) -> str:
        """Everything the service wrote."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def log(self) -> list[dict[str, Any]]:
        """The log's lines; fails where one is not a JSON object."""
        lines = self.raw_log().splitlines()
        strange = [line for line in lines if not line.startswith("{")]
        assert not strange, f"not JSON: {strange}"
        return [json.loads(line) for line in lines]

    def lines(
        self, wanted: Callable[[dict[str, Any]], bool], count: int = 1
    ) -> list[dict[str, Any]]:
        """The log's lines that are wanted, once there are ``count``: a thread writes the log."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.log() if wanted(line)]

        self.wait_for(lambda: len(found()) >= count, f"{count} lines of the log")
        return found()

    def check_log(self) -> None:
        """Assert that no key is in the log, and that each line of it is an object, if it is JSON.

        Some libraries of engines write to it without the service's handler.
        """
        log = self.raw_log()
        assert API_KEY not in log
        assert OTHER_KEY not in log
        if log.startswith("{"):
            self.log()

    def engine_pids(self) -> list[int]:
        """Process ids of all engine processes so far, the present one last."""
        return [e["pid"] for e in self.log() if e["message"] == "engine process started"]

    @property
    def engine_pid(self) -> int:
        """Process id of the present engine process."""
        return self.engine_pids()[-1]

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that have these labels."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines(keepends=True)
        # To parse all of them would take longer than the service takes to write them.
        text = "".join(line for line in lines if line.startswith(name))
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 30.0) -> float:
        """Wait until ``condition`` holds; returns how long it took."""
        started = time.monotonic()
        while not condition():
            waited = time.monotonic() - started
            if waited > seconds:
                raise AssertionError(f"{what} did not happen within {seconds} s")
            # A long wait may be a little longer: to look takes the service's processor time.
            time.sleep(min(0.02 + waited / 20, 0.1))
        return time.monotonic() - started

    def wait_for_metric(self, name: str, value: float, seconds: float = 30.0) -> float:
        """Wait until a metric has a value; returns how long it took."""
        return self.wait_for(lambda: self.metric(name) == value, f"{name} = {value}", seconds)

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until requests would be taken."""
        self.wait_for(self._is_ready, "readiness", seconds)

    def _is_ready(self) -> bool:
        self._check_alive()
        with contextlib.suppress(httpx.TransportError):
            return self.get("/readyz").status_code == 200
        return False

    def _wait_until_listening(self) -> None:
        def found() -> re.Match[str] | None:
            self._check_alive()
            return _LISTENING.search(self.raw_log())

        self.wait_for(found, "listening", START_SECONDS)
        match = found()
        assert match is not None
        self.base_url = match[1]

    def _check_alive(self) -> None:
        status = self.process.poll()
        assert status is None, f"the service ended with status {status}:\n{self.raw_log()}"

    def terminate(self) -> int:
        """Send SIGTERM and wait; returns the exit status."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        """Wait for the service's end; returns the exit status."""
        return self.process.wait(STOP_SECONDS)

    def survivors(self) -> list[str]:
        """Processes that still run of the service and of what it started."""
        return session_members(self.process.pid)


def open_client(service: Service) -> httpx.AsyncClient:
    """A client for asynchronous tests; the caller closes it."""
    return httpx.AsyncClient(
        base_url=service.base_url,
        headers={"X-API-Key": API_KEY},
        timeout=60.0,
        trust_env=False,
        verify=False,  # noqa: S501 - as in Service.client
        limits=httpx.Limits(max_connections=None),
    )


def session_members(session: int) -> list[str]:
    """Processes of a session that still run, without zombies."""
    proc = Path("/proc")
    if not (proc / "self" / "stat").exists():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(session, 0)
            return [f"process group {session}"]
        return []
    members = []
    for stat in proc.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "pid (name) state ppid pgrp session ...", where the name may hold anything.
            state, _, _, number = stat.read_text().rpartition(")")[2].split()[:4]
            if number == str(session) and state not in "ZX":
                command = (stat.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                members.append(f"{stat.parent.name} {command}")
    return members


@contextmanager
def running_service(
    *,
    until: str = "ready",
    command: Sequence[str] = UVICORN,
    interpreter: str = "forked",
    log_to: str = "file",
    **settings: str | None,
) -> Iterator[Service]:
    """Run the service on a free port of this machine, and stop it at the end.

    Args:
        until: Wait until it is ``ready``, or ``listening``, or only ``started``.
        command: The module that starts it, and its arguments.
        interpreter: A ``new`` one, as in production, or one ``forked`` from a process that has
            imported FastAPI and LangChain, which most of a start is.
        log_to: Where it writes its log: a ``file``, or a ``pipe``, which is copied to the file.
        settings: Environment variables, such as ``ENGINE__MAX_RUNNING="1"``.

    At its end the block sends SIGTERM, unless the test has ended the service. It asserts the exit
    status 0, that no process survives, and what :meth:`Service.check_log` asserts.
    """
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "service.log"
        log_path.touch()
        environment = isolated_environment({"APP__PORT": "0", **settings})
        written = log_path
        if log_to == "pipe":
            os.mkfifo(written := Path(folder) / "pipe")
        process: AnyProcess = (
            ForkedProcess(command, environment, written)
            if interpreter == "forked"
            else _new_interpreter(command, environment, written)
        )
        service = Service("", process, log_path)
        service.log_is_read.set()
        if log_to == "pipe":
            threading.Thread(target=_read_log, args=(service, written), daemon=True).start()
        try:
            if until != "started":
                service._wait_until_listening()
            if until == "ready":
                service.wait_until_ready()
            yield service
            if process.poll() is None:
                status = service.terminate()
                assert status == 0, service.raw_log()
                service.check_log()
            service.wait_for(
                lambda: not service.survivors(), "the end of all processes", STOP_SECONDS
            )
        except BaseException as error:
            error.add_note(f"--- the service's log ---\n{service.raw_log()[-4000:]}")
            raise
        finally:
            # It may not have its process group yet.
            process.kill()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            service.log_is_read.set()


def _new_interpreter(
    command: Sequence[str], env: Mapping[str, str], log_path: Path
) -> subprocess.Popen[bytes]:
    with log_path.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=PROJECT_ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _read_log(service: Service, fifo: Path) -> None:
    """Copy the log from its pipe to its file, while it is read."""
    with service.log_path.open("ab") as file, fifo.open("rb") as pipe:
        while service.log_is_read.wait() and (data := os.read(pipe.fileno(), 65_536)):
            file.write(data)
            file.flush()
