"""A short-lived third process that reads the tokenizer while the engine process loads weights.

Reading a tokenizer needs transformers, which takes half a second and 100 MB to import. An engine
process that runs OpenVINO needs it for nothing else, so it starts this module as a program, which
writes its answers as lines of JSON and exits.
"""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import IO, Self, TypeVar

import msgspec

from app.core.config import ModelSettings
from app.llm.models.description import ModelShape, ModelTokenizer, read_shape, read_tokenizer
from app.llm.models.snapshot import Snapshot
from app.utils.errors import ModelLoadError
from app.utils.parent import end_with_parent


class _Failure(msgspec.Struct, frozen=True, tag=True):
    message: str


_Answer = _Failure | ModelShape | ModelTokenizer
T = TypeVar("T", ModelShape, ModelTokenizer)


class TokenizerProcess:
    """The engine process's handle on the third process, which is killed when the block ends.

    Its methods raise :class:`ModelLoadError` where a file cannot be read.
    """

    def __init__(self, settings: ModelSettings, snapshot: Snapshot) -> None:
        arguments = [settings.model_dump_json(), str(snapshot.directory), snapshot.weights or ""]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "app.llm.models.tokenizer_process", *arguments],
            # The process exits when this pipe closes, so it never outlives the engine process.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()

    def shape(self) -> ModelShape:
        """Wait for the model's shape, before the tokenizer; not for a GGUF file."""
        return self._read(ModelShape)

    def tokenizer(self) -> ModelTokenizer:
        """Wait for the tokenizer."""
        return self._read(ModelTokenizer)

    def _read(self, kind: type[T]) -> T:
        output: IO[bytes] | None = self._process.stdout
        line = output.readline() if output else b""
        if not line:
            raise ModelLoadError(
                f"reading the model's tokenizer ended with code {self._process.wait()}: start "
                "again; if it stays, set MODEL__ENGINE=transformers"
            )
        answer = msgspec.json.decode(line, type=_Answer)
        if isinstance(answer, _Failure):
            raise ModelLoadError(answer.message)
        if not isinstance(answer, kind):
            raise TypeError(f"{answer!r} is out of turn")
        return answer


def _keep_torch_out() -> None:
    """Hide torch from transformers, because its import takes another 1.5 seconds and 200 MB.

    transformers warns once that models cannot run without torch; the warning is switched off. Its
    GGUF reader imports torch for weights alone, so an empty module stands in for it.
    """
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    sys.modules["transformers.integrations.gguf.reader"] = ModuleType("reader")


def _exit_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main(arguments: list[str]) -> int:
    """Write the model's shape, unless it is a GGUF file, and its tokenizer to standard output."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # A chat template is tried here, and may hold the interpreter for ever.
    end_with_parent()
    # Imports and a vocabulary make many objects, and the process exits before they are garbage.
    gc.disable()
    _keep_torch_out()
    # Only answers go to standard output: what a library prints goes to standard error.
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(what: _Answer) -> None:
        output.write(msgspec.json.encode(what) + b"\n")
        output.flush()

    settings = ModelSettings.model_validate_json(arguments[0])
    snapshot = Snapshot(Path(arguments[1]), arguments[2] or None)
    try:
        if not snapshot.gguf:
            answer(read_shape(settings, snapshot))
        answer(read_tokenizer(settings, snapshot))
    except ModelLoadError as error:
        answer(_Failure(str(error)))
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
