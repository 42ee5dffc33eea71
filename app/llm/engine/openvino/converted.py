"""Finds safetensors in OpenVINO's own format beside the hub's cache, or has them converted.

A model is converted at its first start by a process that ends with it, because that takes torch and
twice the memory. What it writes gets its name when it is whole and was checked, so a kill leaves
nothing that would be used, and replicas that share the volume share the result.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Final

from huggingface_hub import constants

from app.core.config import ModelSettings
from app.core.machine import available_memory
from app.llm.models.files import fingerprint
from app.llm.models.load_errors import one_line, quantization_method
from app.llm.models.progress import Progress
from app.llm.models.snapshot import OPENVINO_MODEL, Snapshot

FAILED: Final = "failed: "
"""Begins the converting process's line with the reason why there is no model."""

_CODE: Final = ("tracing.py", "compression.py", "conversion.py")
_LIBRARIES: Final = ("openvino", "torch", "transformers")
# Bytes of memory that a conversion takes: of libraries, and for each byte of the files. Measured:
# 4.0 GB for files of 1 GB.
_MEMORY: Final = 8e8
_MEMORY_BY_SIZE: Final = 3.5


class NotConvertedError(Exception):
    """The model is not to be had in OpenVINO's format; the message is the reason."""


def convert_once(settings: ModelSettings, snapshot: Snapshot, progress: Progress) -> Snapshot:
    """The model in OpenVINO's format, from an earlier start or made now.

    Raises:
        NotConvertedError: It cannot be converted, or not be stored.
    """
    if method := quantization_method(snapshot):
        raise NotConvertedError(f"its weights are quantized with {method}")
    config = json.loads((snapshot.directory / "config.json").read_text(encoding="utf-8"))
    if config.get("attn_logit_softcapping"):
        # Gemma 2. The conversion would find it too, after it has read the weights.
        raise NotConvertedError("OpenVINO's paged attention has no softcap")
    folder = _folder(settings, snapshot)
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone(folder.parent, progress) as lock:
                if not folder.is_dir():
                    _convert(settings, snapshot, folder, progress, lock)
    except OSError as error:
        raise NotConvertedError(
            f"its converted weights cannot be kept ({one_line(error)}); make HF_HOME writable"
        ) from error
    return Snapshot(folder, OPENVINO_MODEL, snapshot.revision)


def _folder(settings: ModelSettings, snapshot: Snapshot) -> Path:
    """Where the model is kept: a folder for its name and settings, and in it one for its files."""
    name = settings.label.strip("/").replace("/", "--")
    facts = [version(library) for library in _LIBRARIES]
    if snapshot.revision is None:
        # Merged adapters change some tensors in the middle of a file, and no size.
        folder = snapshot.directory
        files = [*folder.glob("*.*"), *folder.glob("additional_chat_templates/*")]
        facts += [f"{path.name} {path.stat().st_mtime_ns}" for path in sorted(files)]
    code = [Path(__file__).with_name(file) for file in _CODE]
    key = fingerprint(snapshot, code, *facts)
    root = Path(constants.HF_HOME, "openvino-models")
    return root / f"{name[-150:]}-{settings.quantization}-{settings.dtype}" / key[:16]


@contextmanager
def _alone(parent: Path, progress: Progress) -> Iterator[int]:
    """Wait until no other process converts this model; give the lock's file descriptor."""
    with (parent / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another start, which converts the model")
            # The kernel unlocks the file when all who have it open have ended.
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _convert(
    settings: ModelSettings, snapshot: Snapshot, folder: Path, progress: Progress, lock: int
) -> None:
    size = sum(path.stat().st_size for path in snapshot.directory.glob("*.safetensors"))
    needed = _MEMORY + _MEMORY_BY_SIZE * size
    if needed > (free := available_memory()):
        raise NotConvertedError(
            f"its conversion takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: "
            "convert it on a larger machine (make export-openvino)"
        )
    partial = folder.with_name(".partial")
    # A killed process leaves the folder behind.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _run(settings, snapshot, partial, progress, lock)
        for path in partial.glob("openvino_model.*"):
            # Its name must not reach the disk before it does.
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for earlier in folder.parent.iterdir():
            # Those of other versions and weights, which take gigabytes.
            if earlier.is_dir() and earlier != partial:
                shutil.rmtree(earlier, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run(
    settings: ModelSettings, snapshot: Snapshot, folder: Path, progress: Progress, lock: int
) -> None:
    """Have a process fill the folder."""
    progress(f"converting {settings.label} for OpenVINO, once")
    arguments = [settings.model_dump_json(), str(snapshot.directory), str(folder)]
    with subprocess.Popen(
        [sys.executable, "-m", "app.llm.engine.openvino.conversion", *arguments],
        stdout=subprocess.PIPE,
        encoding="utf-8",
        # It may outlive this process for a moment, and then holds the lock while it writes.
        pass_fds=(lock,),
    ) as process:
        reason = None
        for line in process.stdout or ():
            message, _, percent = line.rstrip().partition("\t")
            if message.startswith(FAILED):
                reason = message.removeprefix(FAILED)
            else:
                progress(message, int(percent) if percent.isdigit() else None)
    if process.returncode == -signal.SIGKILL:
        reason = "its conversion was killed, most likely because memory ran out"
    elif process.returncode:
        reason = f"its conversion ended with code {process.returncode}"
    if reason is not None:
        raise NotConvertedError(reason)
