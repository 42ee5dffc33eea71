"""Forks the processes of `make test` from one that has imported what takes each of them seconds.

xdist starts each process with a command. Here that is this file, which passes its files on to the
one process, waits for its fork, and ends with it. The application is not imported before the fork,
because each process measures its coverage.
"""

import gc
import importlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# What takes longest to import, of what the application and the tests import.
_LIBRARIES = (
    *("torch", "transformers.pipelines", "openvino_genai"),
    *("langchain_huggingface", "langchain_openai", "fastapi"),
)
# Seconds from one process to the next.
_PATIENCE = 60.0


def start(config: Any, specs: Sequence[Any]) -> None:
    """Have xdist's processes forked; ``specs`` are theirs, and ``config`` is pytest's."""
    path = Path(tempfile.mkdtemp()) / "workers"
    # There is a test process for each core already; more threads would wait for each other.
    # OpenVINO does not read this variable: with one thread it crashes on a tiny model.
    environment = {**os.environ, "MKL_NUM_THREADS": "1"}
    # Without this folder in the path, whose queue.py is not Python's.
    command = [sys.executable, "-P", __file__, str(path)]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        number = listener.fileno()
        process = subprocess.Popen(
            [*command, str(number), str(len(specs))], env=environment, pass_fds=[number]
        )
    for spec in specs:
        spec.python = " ".join(command)

    def end() -> None:
        process.wait()

    config.add_cleanup(end)


def _serve(path: Path, listener: socket.socket, count: int) -> None:
    gc.disable()
    # As keep_telemetry_out() does, whose module the forks measure.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    for name in _LIBRARIES:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    listener.settimeout(_PATIENCE)
    for _ in range(count):
        asking, _ = listener.accept()
        _, files, *_ = socket.recv_fds(asking, 1, 3)
        if os.fork() == 0:
            listener.close()
            _work(files)
            return
        for number in (asking.detach(), *files):
            os.close(number)
    path.unlink()
    path.parent.rmdir()


def _work(files: Sequence[int]) -> None:
    """Do what the command does that execnet has for a process, with these files."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["-c"]
    sys.modules["__main__"] = main = ModuleType("__main__")
    exec(eval(sys.stdin.readline()), vars(main))  # noqa: S102, S307 - as execnet's own command


def _pass_on(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [b"0"], [0, 1, 2])
        server.recv(1)


if __name__ == "__main__":
    if sys.argv[2].isdigit():
        _serve(Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
    else:
        _pass_on(sys.argv[1])
