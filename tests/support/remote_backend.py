"""A backend in another interpreter, for the tests of backends: each method is a call over a pipe.

``python -m tests.support.remote_backend`` is the other end. Its first message names the model.
"""

import os
import subprocess
import sys
import weakref
from typing import Any, Final, Literal

import msgspec

from app.core.config import PROJECT_ROOT, ModelSettings
from app.llm.loader import load_backend
from app.llm.protocol import Backend, EngineInfo, EngineStats, GenerationRequest, TokenEvent

_LENGTH_BYTES: Final = 4
_Method = Literal["add", "cancel", "step", "has_work", "stats"]


class _Answer(msgspec.Struct):
    value: Any = None
    error: str | None = None


class RemoteBackend:
    """A backend in a process of ``python``; an exception there is a :class:`RuntimeError` here.

    Args:
        arguments: vLLM's.
    """

    def __init__(
        self, python: str, settings: ModelSettings, max_running: int, **arguments: Any
    ) -> None:
        self._process = subprocess.Popen(
            [python, "-m", "tests.support.remote_backend"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=PROJECT_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
        )
        weakref.finalize(self, _end, self._process)
        told = {"model": settings.model_dump(), "max_running": max_running, "arguments": arguments}
        self.info = msgspec.convert(self._ask(told), EngineInfo)

    def _ask(self, message: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        _write(self._process.stdin, message)
        answer = msgspec.convert(_read(self._process.stdout), _Answer)
        if answer.error is not None:
            raise RuntimeError(answer.error)
        return answer.value

    def _call(self, method: _Method, *arguments: Any) -> Any:
        return self._ask([method, *arguments])

    def add(self, request: GenerationRequest) -> None:
        """As :meth:`Backend.add`."""
        self._call("add", request)

    def cancel(self, request_id: str) -> None:
        """As :meth:`Backend.cancel`."""
        self._call("cancel", request_id)

    def step(self) -> list[TokenEvent]:
        """As :meth:`Backend.step`."""
        return msgspec.convert(self._call("step"), list[TokenEvent])

    def has_work(self) -> bool:
        """As :meth:`Backend.has_work`."""
        return bool(self._call("has_work"))

    def stats(self) -> EngineStats:
        """As :meth:`Backend.stats`."""
        return msgspec.convert(self._call("stats"), EngineStats)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _write(stream: Any, message: Any) -> None:
    body = msgspec.msgpack.encode(message)
    stream.write(len(body).to_bytes(_LENGTH_BYTES, "big") + body)
    stream.flush()


def _read(stream: Any) -> Any:
    length = int.from_bytes(stream.read(_LENGTH_BYTES), "big")
    return msgspec.msgpack.decode(stream.read(length))


def _carry_out(backend: Backend, method: _Method, arguments: list[Any]) -> _Answer:
    if method == "add":
        arguments = [msgspec.convert(arguments[0], GenerationRequest, strict=False)]
    try:
        return _Answer(getattr(backend, method)(*arguments))
    except Exception as error:  # noqa: BLE001 - the caller is told
        return _Answer(error=f"{type(error).__name__}: {error}")


def main() -> None:
    """Serve until the pipe is closed."""
    # Libraries write to standard output.
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    told = _read(calls)
    try:
        backend = load_backend(
            ModelSettings(**told["model"]),
            max_running=told["max_running"],
            echo_step_seconds=0,
            vllm_arguments=told["arguments"],
            token=None,
            progress=lambda *_: None,
        )
    except Exception as error:  # noqa: BLE001 - the caller is told
        _write(answers, _Answer(error=f"{type(error).__name__}: {error}"))
        return
    _write(answers, _Answer(backend.info))
    while True:
        method, *arguments = _read(calls)
        _write(answers, _carry_out(backend, method, arguments))


if __name__ == "__main__":
    main()
