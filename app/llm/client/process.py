"""Starting, talking to and ending the engine process, from the API process's side."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
from collections.abc import Mapping

from app.core.config import PROJECT_ROOT, ModelSettings
from app.core.config.engine import EngineSettings
from app.core.logging import STDERR, get_logger
from app.core.machine import THREADS_VARIABLE, compute_threads
from app.llm.protocol import HEADER_BYTES, Command, Report, Stop, body_length, pack, unpack_report
from app.utils.errors import ConfigurationError

log = get_logger()

# Libraries' output is read in pieces of this size; a longer text becomes several log lines.
_WRITTEN_BYTES = 4096
_MAX_LAST_WRITTEN = 200
# The engine ends at once when it is told to, unless a step holds its interpreter. It has nothing
# to save, so it can be killed then.
_STOP_SECONDS = 1.0
# Ctrl-C reaches the whole process group, and a service manager may send SIGTERM to every process,
# but the service lets running requests finish. Programs inherit what is ignored: Python alone would
# be late, and uvloop resets what a child would inherit from this process.
_IGNORING_SIGNALS = ("/bin/sh", "-c", 'trap "" INT TERM; exec "$@"', "sh")
# The engine does not need the service's keys, and a crash dump may show the environment.
_WITHHELD = ("SECURITY__", "HUGGINGFACE_TOKEN", "HF_TOKEN", "LANGSMITH_", "LANGCHAIN_")


VLLM_PYTHON = PROJECT_ROOT / ".tools" / "vllm" / "bin" / "python"
"""The interpreter that ``make install-vllm`` makes."""


def engine_python(model: ModelSettings, engine: EngineSettings) -> str:
    """The interpreter of the engine process; vLLM has an environment of its own.

    Raises:
        ConfigurationError: It is not there.
    """
    if engine.python:
        if found := shutil.which(engine.python):
            return found
        fault = f"engine.python is {engine.python}, which is no program"
    elif model.engine == "vllm":
        if VLLM_PYTHON.exists():
            return str(VLLM_PYTHON)
        fault = f"model.engine is vllm, but there is no {VLLM_PYTHON}"
    else:
        # By its name alone: the files may have to be downloaded.
        is_gguf = model.source == "bundled" or model.name.lower().endswith(".gguf")
        takes_vllm = model.engine == "auto" and model.device == "cuda" and not is_gguf
        return str(VLLM_PYTHON) if takes_vllm and VLLM_PYTHON.exists() else sys.executable
    raise ConfigurationError(
        f"configuration error: {fault}: run make install-vllm, or set ENGINE__PYTHON to the "
        "interpreter of an environment that has the engine"
    )


class EngineProcess:
    """One run of the engine process; it is never started twice.

    Attributes:
        last_written: The last line on its standard error, for example of a traceback.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.pid = process.pid
        self._process = process
        self._reader = reader
        self._writer = writer
        self._killed_because = ""
        self.last_written = ""
        # Native libraries write to standard error without the logger, also when they crash.
        self._written = asyncio.create_task(self._log_lines(process.stderr), name="engine-stderr")

    @classmethod
    async def start(cls, python: str = sys.executable) -> "EngineProcess":
        """Start the process, with an interpreter, and connect to it.

        Raises:
            OSError: The machine has no process or file descriptor left.
        """
        # This reads files of control groups, which would block the event loop.
        environment = await asyncio.to_thread(engine_environment, os.environ)
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as stack:
            descriptors = (theirs.fileno(), os.dup(STDERR))
            stack.callback(os.close, descriptors[1])
            try:
                process = await asyncio.create_subprocess_exec(
                    *_IGNORING_SIGNALS,
                    python,
                    "-m",
                    "app.llm.engine.worker",
                    *map(str, descriptors),
                    stdin=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                    pass_fds=descriptors,
                    env=environment,
                )
            except BaseException:
                ours.close()
                raise
        try:
            reader, writer = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            process.kill()
            raise
        return cls(process, reader, writer)

    def send(self, command: Command) -> None:
        """Queue a command; dropped when the process is gone, which :meth:`receive` notices."""
        if not self._writer.is_closing():
            self._writer.write(pack(command))

    async def receive(self) -> Report | None:
        """Wait for the next report; ``None`` when the process has closed its end."""
        try:
            header = await self._reader.readexactly(HEADER_BYTES)
            body = await self._reader.readexactly(body_length(header))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return unpack_report(body)

    async def wait(self) -> str:
        """Wait for the end; returns why the process ended, for the log."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        code = await self._exit_code()
        await asyncio.wait({self._written}, timeout=_STOP_SECONDS)
        return self._killed_because or _describe_exit(code)

    async def stop(self) -> None:
        """Ask the process to end, and kill it if it does not."""
        self.send(Stop())
        await self._exit_code()

    async def _log_lines(self, stderr: asyncio.StreamReader | None) -> None:
        """Log what the process writes to standard error, until it has ended."""
        while stderr is not None and (data := await stderr.read(_WRITTEN_BYTES)):
            for line in filter(str.strip, data.decode("utf-8", "replace").splitlines()):
                self.last_written = line.strip()[:_MAX_LAST_WRITTEN]
                log.warning("the engine process wrote: %s", line)

    async def _exit_code(self) -> int:
        """Wait until the process ends, and kill it if it does not."""
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                return await self._process.wait()
        except TimeoutError:
            self.kill()
            return await self._process.wait()

    def kill(self, because: str = "") -> None:
        """End the process at once; :meth:`wait` returns the first reason given, if there is one."""
        self._killed_because = self._killed_because or because
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        # A process that waits for a disk outlives the signal. Its requests must not wait for it.
        self._writer.transport.abort()


def engine_environment(base: Mapping[str, str]) -> dict[str, str]:
    """The environment of an engine process: ``base`` without secrets, with the threads' number."""
    environment = {k: v for k, v in base.items() if not k.upper().startswith(_WITHHELD)}
    # torch's threads wait for each other by spinning. By default they spin so long that every layer
    # stalls when another process wants a core. This is just longer than the gaps between parallel
    # parts of a forward pass, in which no thread should fall asleep: docs/adr/0010.
    environment.setdefault("GOMP_SPINCOUNT", "3000")
    # torch reads it when it is imported. Its default counts the host's cores, not the container's.
    environment[THREADS_VARIABLE] = str(compute_threads(environment))
    # The clients of the hub would report versions and transfers: huggingface_hub, hf_xet.
    environment["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # Progress bars would make the log unreadable.
    environment["TQDM_DISABLE"] = "1"
    # The service may have been started from any folder.
    paths = [str(PROJECT_ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    hint = " (often: out of memory)" if -code == signal.SIGKILL else ""
    return f"signal {signal.Signals(-code).name}{hint}"
