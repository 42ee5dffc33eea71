"""Starts programs from a process that has imported what they all import.

A service's start is mostly imports: 2.2 of its 2.8 seconds of processor time.
"""

import contextlib
import io
import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import TimeoutExpired

from app.core.config import PROJECT_ROOT

# None of them reads an environment variable or a file that a test sets.
_IMPORTED = ["uvicorn", "app.main", "app.llm.chain", "transformers.utils.chat_template_utils"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_IMPORTED)


class ForkedProcess:
    """A module that runs as ``python -m`` would run it, or a file, in a session of its own.

    The methods are those of :class:`subprocess.Popen`.
    """

    stdout: io.BufferedIOBase | None = None

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self._process = _context.Process(target=_run, args=(command, dict(env), log))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status, negative for a signal; ``None`` while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raises ``TimeoutExpired``."""
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise TimeoutExpired(str(self.pid), timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _run(command: Sequence[str], env: dict[str, str], log: Path) -> None:
    os.setsid()
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    with log.open("wb") as output, Path(os.devnull).open("rb") as nothing:
        for number, file in enumerate((nothing, output, output)):
            os.dup2(file.fileno(), number)
    os.chdir(PROJECT_ROOT)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = list(command)
    if command[0].endswith(".py"):
        runpy.run_path(command[0], run_name="__main__")
    else:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _end_with_the_tests() -> None:
    """Kill the service and its engine process when the test process has been killed."""
    if (tests := multiprocessing.parent_process()) is not None:
        tests.join()
        os.killpg(os.getpid(), signal.SIGKILL)
