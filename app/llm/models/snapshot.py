"""A model's files on this machine, and the choice of the file that holds its weights."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from app.utils.errors import ModelLoadError

OPENVINO_MODEL = "openvino_model.xml"
"""The file that marks a folder in OpenVINO's own format; a .bin file beside it has the weights."""

# The file or the index that transformers looks for, or an adapter's, which is refused by its base.
_SAFETENSORS = {"model.safetensors", "model.safetensors.index.json", "adapter_config.json"}
_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
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

    @property
    def weight_bytes(self) -> int:
        """Size of the weights' files."""
        pattern = "openvino_*.bin" if self.is_openvino else "*.safetensors"
        files = [self.directory / self.gguf] if self.gguf else self.directory.glob(pattern)
        return sum(file.stat().st_size for file in files)


def is_gguf(name: str) -> bool:
    """Whether a file's name is that of a GGUF file."""
    return name.lower().endswith(".gguf")


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
        ModelLoadError: The model has no weights in a form that is read, or several GGUF files.
    """
    gguf = sorted(filter(is_gguf, names))
    whole = [n for n in gguf if not _GGUF_PART.search(n)]
    if wanted and wanted not in names:
        raise ModelLoadError(
            f"{where} has no file {wanted}: correct MODEL__NAME; "
            f"it has {', '.join(gguf) or 'no GGUF file'}"
        )
    if wanted and wanted not in gguf:
        raise ModelLoadError(
            f"{where}/{wanted} is not a GGUF file: for safetensors set MODEL__NAME to their folder"
        )
    if wanted in whole:
        return wanted
    # Subfolders hold other formats, or parts of other kinds of models.
    top = [n for n in names if "/" not in n]
    if not wanted:
        if openvino and OPENVINO_MODEL in top:
            return OPENVINO_MODEL
        if _SAFETENSORS & set(top):
            return None
        if len(gguf) == 1 and whole:
            return gguf[0]
    raise ModelLoadError(_explain(top, where, gguf, None if wanted else next(iter(whole), None)))


def _explain(top: list[str], where: str, gguf: list[str], whole: str | None) -> str:
    """Why no weights can be taken, and what to do; ``whole`` is one of several whole GGUF files."""
    if whole:
        return (
            f"{where} has several GGUF files: name one of them, as in MODEL__NAME={where}/{whole}"
        )
    if gguf:
        return (
            f"{where} has a GGUF file in parts, {gguf[0]} for one, which are not read: join them "
            "with llama.cpp (llama-gguf-split --merge PART WHOLE) and set MODEL__SOURCE=local and "
            "MODEL__NAME to the whole file, or choose a model in one file"
        )
    if OPENVINO_MODEL in top:
        return (
            f"{where} has only OpenVINO weights: set MODEL__DEVICE=cpu and MODEL__ENGINE=auto, or "
            "choose a model with safetensors or GGUF weights"
        )
    if tensors := sorted(n for n in top if n.endswith(".safetensors")):
        return (
            f"{where} has {tensors[0]}, but no model.safetensors: choose a model in the layout "
            "of transformers (config.json, model.safetensors, tokenizer.json), or a GGUF file"
        )
    if any(n.endswith(_PICKLE_SUFFIXES) for n in top):
        return (
            f"{where} has only pickled weights, which can run code when they are loaded and are "
            "refused: choose a model with safetensors or GGUF weights"
        )
    return f"{where} has no weights: choose a model with safetensors or GGUF files at its top level"
