"""Finds safetensors in OpenVINO's own format beside the hub's cache, or has them converted.

A model is converted at its first start by a process that ends with it, because that takes torch and
twice the memory. What it writes gets its name when it is whole and was checked, so a kill leaves
nothing that would be used, and replicas that share the volume share the result.
"""

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Final

import msgspec
from huggingface_hub import constants

from app.core.config import ModelSettings
from app.core.machine import available_memory
from app.llm.models.files import fingerprint
from app.llm.models.load_errors import one_line, quantization_method
from app.llm.models.snapshot import OPENVINO_MODEL, Progress, Snapshot

# In the place of a model that is not converted rightly: the reason, for later starts.
_REFUSED: Final = "refused.txt"
_CODE: Final = ("tracing.py", "compression.py", "conversion.py")
_LIBRARIES: Final = ("openvino", "torch", "transformers")
# Memory that a conversion takes, by the size of the files. Measured: 4 GB for one of 1 GB.
_MEMORY: Final = 4


class NotConvertedError(Exception):
    """The model is not to be had in OpenVINO's format; the message is the reason."""


class Said(msgspec.Struct, frozen=True, tag=True):
    """A line of the converting process on its progress."""

    message: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Why it ends without a model; ``lasts`` if another start would end likewise."""

    message: str
    lasts: bool


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
            with _alone(folder.parent, progress):
                if not folder.is_dir():
                    _convert(settings, snapshot, folder, progress)
        if (refused := folder / _REFUSED).is_file():
            raise NotConvertedError(refused.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotConvertedError(
            f"its converted weights cannot be kept ({one_line(error)}); make HF_HOME writable"
        ) from error
    return Snapshot(folder, OPENVINO_MODEL, snapshot.revision)


def _folder(settings: ModelSettings, snapshot: Snapshot) -> Path:
    """Where the model is kept: a folder for its name and settings, and in it one for its files."""
    name = settings.label.strip("/").replace("/", "--")
    made_with = [version(library) for library in _LIBRARIES]
    code = [Path(__file__).with_name(file) for file in _CODE]
    key = fingerprint(snapshot, code, made_with, settings.quantization, settings.dtype)
    root = Path(constants.HF_HOME, "openvino-models")
    return root / f"{name[-150:]}-{settings.quantization}-{settings.dtype}" / key[:16]


@contextmanager
def _alone(parent: Path, progress: Progress) -> Iterator[None]:
    """Wait until no other process converts this model."""
    with (parent / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another start, which converts the model")
            # The kernel unlocks the file when it is closed, or its process ends.
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _convert(settings: ModelSettings, snapshot: Snapshot, folder: Path, progress: Progress) -> None:
    needed = _MEMORY * sum(path.stat().st_size for path in snapshot.directory.glob("*.safetensors"))
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
        _run(settings, snapshot, partial, progress)
        for earlier in folder.parent.iterdir():
            # Those of other versions and weights, which take gigabytes.
            if earlier.is_dir() and earlier != partial:
                shutil.rmtree(earlier, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run(settings: ModelSettings, snapshot: Snapshot, folder: Path, progress: Progress) -> None:
    """Have a process fill the folder with the model, or with the reason why there is none."""
    arguments = [settings.model_dump_json(), str(snapshot.directory), str(folder)]
    with subprocess.Popen(
        [sys.executable, "-m", "app.llm.engine.openvino.conversion", *arguments],
        stdout=subprocess.PIPE,
    ) as process:
        for line in process.stdout or ():
            said = msgspec.json.decode(line, type=Said | Refused)
            if isinstance(said, Said):
                progress(said.message)
            elif said.lasts:
                shutil.rmtree(folder)
                folder.mkdir()
                (folder / _REFUSED).write_text(said.message, encoding="utf-8")
            else:
                raise NotConvertedError(said.message)
    if process.returncode:
        raise NotConvertedError(f"its conversion ended with code {process.returncode}")
