"""A model's files on this machine, and the choice of the file that holds its weights."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from app.utils.errors import ModelLoadError

Progress = Callable[[str], None]
"""Called with one line on the progress, for the log and for /status."""

OPENVINO_MODEL = "openvino_model.xml"
"""The file that marks a folder in OpenVINO's own format; a .bin file beside it has the weights."""

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model's files on this machine.

    Attributes:
        directory: Folder of the files.
        weights: Name of the GGUF file, or :data:`OPENVINO_MODEL`; ``None`` for safetensors.
        revision: Commit of the hub repository; the checksum of the bundled model; else ``None``.
    """

    directory: Path
    weights: str | None
    revision: str | None = None

    @property
    def is_openvino(self) -> bool:
        """Whether the model is in OpenVINO's own format."""
        return self.weights == OPENVINO_MODEL

    @property
    def gguf(self) -> str | None:
        """Name of the GGUF file; ``None`` for the other formats."""
        return None if self.is_openvino else self.weights


def check_storage(folder: Path) -> None:
    """Check that models can be stored in a folder, which may be missing yet.

    Raises:
        ModelLoadError: It cannot be made, or nothing can be written into it.
    """
    nearest = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise ModelLoadError(
            f"models cannot be stored in {folder}, since {nearest} is no folder or cannot be "
            "written: make it writable, or set HF_HOME to another folder"
        )


def choose_weights(
    names: list[str], where: str, wanted: str | None = None, *, openvino: bool = False
) -> str | None:
    """Choose the file that holds the weights.

    ``where`` is the repository or folder for error messages, and ``wanted`` the GGUF file that
    MODEL__NAME names. OpenVINO's own format is preferred where ``openvino`` may run the model.

    Returns:
        ``None`` for safetensors, else the name of the GGUF file or :data:`OPENVINO_MODEL`.

    Raises:
        ModelLoadError: The model has no weights, only pickled ones, or several GGUF files.
    """
    gguf = sorted(n for n in names if n.endswith(".gguf"))
    if wanted:
        if wanted in names:
            return wanted
        raise ModelLoadError(
            f"{where} has no file {wanted}: correct MODEL__NAME; "
            f"it has {', '.join(gguf) or 'no GGUF file'}"
        )
    # Subfolders hold other formats, or parts of other kinds of models.
    top = [n for n in names if "/" not in n]
    if openvino and OPENVINO_MODEL in top:
        return OPENVINO_MODEL
    if any(n.endswith(".safetensors") for n in top):
        return None
    if len(gguf) == 1:
        return gguf[0]
    if gguf:
        raise ModelLoadError(
            f"{where} has several GGUF files: name one of them, as in MODEL__NAME={where}/{gguf[0]}"
        )
    if OPENVINO_MODEL in top:
        raise ModelLoadError(
            f"{where} has only OpenVINO weights: set MODEL__DEVICE=cpu and MODEL__ENGINE=auto, or "
            "choose a model with safetensors or GGUF weights"
        )
    if any(n.endswith(_PICKLE_SUFFIXES) for n in top):
        raise ModelLoadError(
            f"{where} has only pickled weights, which can run code when they are loaded and are "
            "refused: choose a model with safetensors or GGUF weights"
        )
    raise ModelLoadError(
        f"{where} has no weights: choose a model with safetensors or GGUF files at its top level"
    )
