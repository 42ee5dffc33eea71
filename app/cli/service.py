"""A service that a command talks to: one that runs, or one of its own."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import httpx

from app.utils.errors import StartupError

_POLL_SECONDS = 0.25
# C0 and C1 but tab and line feed: a terminal obeys them, and a model may be told to write them.
_CONTROLS = dict.fromkeys([*set(range(32)) - {9, 10}, *range(127, 160)], "\ufffd")


def harmless(text: str) -> str:
    """Text from the service without the characters that control a terminal."""
    return text.translate(_CONTROLS)


@contextmanager
def own_service() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start the configured service on a free port of this machine alone, and stop it in the end.

    Yields its address and its process, which still loads the model.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = {"APP__HOST": "127.0.0.1", "APP__PORT": str(port), "LOGGING__FORMAT": "json"}
    with tempfile.TemporaryFile() as log:
        # In a session of its own it does not see the terminal's Ctrl-C.
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve"],
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield f"http://127.0.0.1:{port}", process
            if process.poll() is not None:
                raise StartupError(f"the service has ended: {_last_message(log)}")
        finally:
            process.terminate()
            process.wait()


def _last_message(log: IO[bytes]) -> str:
    """The last line of the service's log, which says why it ended."""
    log.seek(0)
    line = (log.read().decode(errors="replace").splitlines() or ["it said nothing"])[-1]
    try:
        return str(json.loads(line)["message"])
    except (ValueError, TypeError, KeyError):
        return line


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes] | None) -> str | None:
    """Wait until the service takes requests, and show at a terminal what it loads.

    ``process`` is one of our own, which needs a moment before it listens.

    Returns:
        The model's name; ``None`` where our own process has ended.

    Raises:
        httpx.TransportError: Nothing listens there.
        StartupError: Something else does.
    """
    while process is None or process.poll() is None:
        message = "starting the service"
        try:
            status = client.get("/status").json()
            engine = status["engine"]
            if engine["state"] == "ready":
                _show("")
                return str(status["model"]["name"])
            message = str(engine["message"] or engine["state"])
        except httpx.TransportError:
            if process is None:
                raise
        except (ValueError, TypeError, KeyError):
            raise StartupError(f"what answers at {client.base_url} is no such service") from None
        _show(harmless(message))
        time.sleep(_POLL_SECONDS)
    _show("")
    return None


def _show(text: str) -> None:
    """Draw the status line anew; nothing is drawn where standard error is no terminal."""
    if sys.stderr.isatty():
        width = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
        print(f"\r\033[K{text[:width]}", end="", file=sys.stderr, flush=True)
