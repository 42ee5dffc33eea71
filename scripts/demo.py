"""Show the service: `make demo`, or `python -m scripts.demo` inside the environment.

Starts the service with the bundled model on a free port, waits until it is ready, asks it a
question over a stream, shows how to ask the next one, and stops it. With KEEP=1 it leaves the
service running.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import httpx

from app.llm.models.bundled import FetchError
from scripts.fetch_model import fetch_with_progress

ROOT = Path(__file__).resolve().parents[1]
LOG = ROOT / ".demo" / "service.log"
QUESTION = "What is the capital of France?"
NEXT_QUESTION = "Name three colours."

READY_SECONDS = 300.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.25
LINE_SECONDS = 5.0
LOG_LINES = 20


class DemoError(Exception):
    """The demo failed; the message is one line with the reason."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A streamed answer: text, tokens, and seconds after the request was sent."""

    text: str
    tokens: int
    first_piece_seconds: float
    seconds: float


# --- The service ----------------------------------------------------------------------------------


@contextmanager
def running_service(key: str, *, keep: bool) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the service with the bundled model; yields its URL and process.

    It is stopped in the end, unless it is to be kept and nothing has failed.
    """
    port = _free_port()
    LOG.parent.mkdir(exist_ok=True)
    environment = os.environ | {
        "MODEL__SOURCE": "bundled",
        "SECURITY__API_KEY": key,
        "LOGGING__FORMAT": "json",
    }
    address = ["--host", "127.0.0.1", "--port", str(port)]
    with LOG.open("wb") as log:
        # In a new session Ctrl-C reaches only the demo, which then stops the service in order, and
        # all processes that the service starts are one group.
        process = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "app.main:app", *address],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    print(f"Starting the service on port {port} (process {process.pid}, log {LOG})", flush=True)
    try:
        yield f"http://127.0.0.1:{port}", process
    except BaseException:
        # The first error matters more than a failure of the stop.
        _kill_group(process)
        raise
    if not keep:
        stop(process)


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    """Wait for /readyz and show the status of /health meanwhile.

    Raises:
        DemoError: The service ended, or was not ready in time.
    """
    started = time.monotonic()
    line = _StatusLine()
    while (seconds := time.monotonic() - started) < READY_SECONDS:
        if process.poll() is not None:
            line.end()
            raise DemoError(f"the service stopped while starting, with status {process.returncode}")
        status = "starting"
        try:
            if client.get("/readyz").status_code == httpx.codes.OK:
                line.show("ready", seconds, last=True)
                return
            status = str(client.get("/health").json().get("status", status))
        except (httpx.TransportError, ValueError, AttributeError):
            # Nothing listens yet, or another program answers; the timeout covers both.
            pass
        line.show(status, seconds)
        time.sleep(POLL_SECONDS)
    line.end()
    raise DemoError(f"the service was not ready after {READY_SECONDS:.0f} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the service, and wait until it and its processes have exited.

    Raises:
        DemoError: It had exited already, or did not stop in time.
    """
    if process.poll() is not None:
        raise DemoError(f"the service stopped by itself, with status {process.returncode}")
    print("\nStopping the service", end="", flush=True)
    started = time.monotonic()
    process.terminate()
    while process.poll() is None or _group_alive(process):
        if time.monotonic() - started > STOP_SECONDS:
            print(flush=True)
            _kill_group(process)
            raise DemoError(f"the service did not stop within {STOP_SECONDS:.0f} s; it was killed")
        time.sleep(0.05)
    if process.returncode != 0:
        print(flush=True)
        raise DemoError(f"the service stopped with status {process.returncode}")
    print(f": done in {time.monotonic() - started:.1f} s, no process left.", flush=True)


def _group_alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process of the service's session runs, such as the engine process."""
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    # In a container whose first process does not reap orphans, dead processes stay as zombies.
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _parent, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == process.pid and state != "Z":
                return True
    return not Path("/proc/self").exists()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Terminate the service, and kill it after 5 s."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- The question ---------------------------------------------------------------------------------


def ask(client: httpx.Client, key: str, question: str) -> Answer:
    """Ask over /v1/chat and print the answer as its pieces arrive.

    Raises:
        DemoError: The service answered with an error, or without text.
    """
    body = _chat(question) | {"temperature": 0}
    pieces: list[str] = []
    tokens = 0
    first = 0.0
    started = time.monotonic()
    with client.stream("POST", "/v1/chat", json=body, headers={"X-API-Key": key}) as response:
        if response.status_code != httpx.codes.OK:
            text = " ".join(response.read().decode(errors="replace").split())
            raise DemoError(f"the service answered {response.status_code}: {text}")
        for event in _events(response):
            if "error" in event:
                raise DemoError(f"the stream ended with an error: {json.dumps(event['error'])}")
            piece = event.get("delta", {}).get("content", "")
            if piece:
                first = first or time.monotonic() - started
                pieces.append(piece)
                print(piece, end="", flush=True)
            tokens = event.get("tokens_generated", tokens)
    print(flush=True)
    if not pieces or not tokens:
        raise DemoError("the stream ended without an answer")
    return Answer("".join(pieces), tokens, first, time.monotonic() - started)


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream's `data:` lines, without comments and `[DONE]`."""
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            try:
                yield json.loads(data)
            except ValueError as error:
                raise DemoError(f"the stream holds a line that is not JSON: {data}") from error


def _chat(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "stream": True}


def curl_command(key: str, question: str, port: int = 8000) -> str:
    """The shell command that asks `question`."""
    return (
        f"curl -N http://localhost:{port}/v1/chat \\\n"
        '    -H "Content-Type: application/json" \\\n'
        f'    -H "X-API-Key: {key}" \\\n'
        f"    -d {shlex.quote(json.dumps(_chat(question)))}"
    )


# --- The terminal ---------------------------------------------------------------------------------


class _StatusLine:
    """A status that is redrawn on a terminal, and printed on change or every 5 s elsewhere."""

    def __init__(self) -> None:
        self._redraws = sys.stdout.isatty()
        self._told = ""
        self._told_at = 0.0
        self._width = 0

    def show(self, status: str, seconds: float, *, last: bool = False) -> None:
        text = f"{status}, {seconds:.1f} s"
        if self._redraws:
            print(f"\r  {text:<{self._width}}", end="\n" if last else "", flush=True)
            self._width = len(text)
        elif status != self._told or seconds - self._told_at >= LINE_SECONDS:
            self._told, self._told_at = status, seconds
            print(f"  {text}", flush=True)

    def end(self) -> None:
        if self._redraws:
            print(flush=True)


def _log_tail() -> str:
    """The last lines of the service's log."""
    try:
        lines = LOG.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(f"  | {line}" for line in lines[-LOG_LINES:])


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    """Raise an exception at SIGTERM, so that the service is stopped too."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def demo() -> None:
    """Run the demo.

    Raises:
        DemoError, FetchError, httpx.HTTPError: A step failed.
    """
    fetch_with_progress()
    key = secrets.token_urlsafe(24)
    keep = os.environ.get("KEEP", "") not in ("", "0")
    with running_service(key, keep=keep) as (url, process):
        # A proxy of the environment may not reach this machine.
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            wait_until_ready(client, process)
            print(f"\nQuestion: {QUESTION}\nAnswer:   ", end="", flush=True)
            answer = ask(client, key, QUESTION)
        print(
            f"\n{answer.tokens} tokens in {answer.seconds:.2f} s: "
            f"{answer.tokens / answer.seconds:.1f} tokens per second, "
            f"the first after {answer.first_piece_seconds:.2f} s."
        )
        port = 8000
        if keep:
            port = int(url.rpartition(":")[2])
            print(f"\nThe service goes on; `kill {process.pid}` stops it.", end=" ")
        else:
            print("\nFor the next question, start the service with")
            print(f"\n  MODEL__SOURCE=bundled SECURITY__API_KEY={key} make run\n")
        print(f"Its page is http://localhost:{port}/, which asks for the key {key}.")
        print("\nOr ask it from another terminal:")
        print(f"\n  {curl_command(key, NEXT_QUESTION, port)}")


def main() -> int:
    """Run the demo, and return the exit status."""
    signal.signal(signal.SIGTERM, _leave)
    try:
        demo()
    except (DemoError, FetchError, httpx.HTTPError) as error:
        print(f"\nerror: {str(error) or type(error).__name__}", file=sys.stderr)
        if isinstance(error, DemoError | httpx.HTTPError) and (tail := _log_tail()):
            print(f"The last lines of {LOG}:\n{tail}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped, and the service with it.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
