"""Checks a model's files before a library reads them."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from app.llm.models import gguf_header
from app.llm.models.load_errors import one_line
from app.llm.models.snapshot import Snapshot
from app.utils.errors import ModelLoadError

MAX_SIZE: Final = 2**20
"""Most elements in a dimension of a tensor; the largest vocabularies have 262,144 tokens."""

# As much of each file tells it from others of its size.
_HEAD = 1 << 16
# Layers of a model whose tensors are not counted; the deepest have 126.
_MAX_LAYERS = 10_000
# Most weights in a byte.
_WEIGHTS_PER_BYTE = 8
# Names of sizes in config.json. Lengths of the context are compared with the memory later.
_SIZE = re.compile(
    r"^(?:num_hidden_|num_|n_)(layers?)$|(?:^|_)(?:size|dim|heads|embd|inner|d_model)$"
)


def fingerprint(snapshot: Snapshot, code: Iterable[Path], *facts: object) -> str:
    """A name for what is made of a model's files by the source files ``code``, given ``facts``."""
    digest = hashlib.sha256(repr((facts, snapshot.revision, snapshot.weights)).encode())
    folder = snapshot.directory
    files = (
        [folder / snapshot.weights]
        if snapshot.weights
        else [*folder.glob("*.json"), *folder.glob("*.safetensors")]
    )
    for path in (*sorted(code), *sorted(files)):
        with path.open("rb") as file:
            digest.update(repr((path.name, path.stat().st_size)).encode() + file.read(_HEAD))
    return digest.hexdigest()


def check_folder(folder: Path) -> None:
    """Refuse a local folder in which a link leads elsewhere.

    Raises:
        ModelLoadError: It names the link.
    """
    for path in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        _check_link(path, folder)


def _check_link(path: Path, folder: Path) -> None:
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    # In the hub's cache the files of a snapshot are links to blobs beside all snapshots.
    in_cache = root.parent.name == "snapshots" and target.is_relative_to(
        root.parent.parent / "blobs"
    )
    if not (target.is_relative_to(root) or in_cache):
        raise ModelLoadError(
            f"{path} leads out of {folder}, which is refused: copy the file into the folder, or "
            "set MODEL__NAME to the folder that has all of the files"
        )


def check_files(snapshot: Snapshot) -> None:
    """Reject truncated weights, and files that are not what their name says, before loading them.

    Raises:
        ModelLoadError: It names the file.
    """
    _check_adapter(snapshot.directory)
    if snapshot.gguf:
        path = snapshot.directory / snapshot.gguf
        with path.open("rb") as file:
            if file.read(4) != gguf_header.MAGIC:
                raise ModelLoadError(f"{path} is not a GGUF file: download it again")
        return
    if snapshot.weights:
        # OpenVINO loads the .xml file even where its weights are missing.
        path = (snapshot.directory / snapshot.weights).with_suffix(".bin")
        if not path.is_file() or not path.stat().st_size:
            raise ModelLoadError(f"{path} is missing or empty: download the model again")
    config = snapshot.directory / "config.json"
    if not config.is_file():
        raise ModelLoadError(
            f"{snapshot.directory} has no config.json: set MODEL__NAME to a model's whole folder"
        )
    sizes = _read_object(config)
    if snapshot.weights:
        # OpenVINO takes the sizes of its tensors from its own files.
        _check_sizes(config, sizes, layers=_MAX_LAYERS, size=sys.maxsize)
        return
    _check_shards(snapshot.directory)
    tensors = size = 0
    for path in sorted(snapshot.directory.glob("*.safetensors")):
        try:
            # The library calls a file that may not be read missing.
            path.open("rb").close()
            with safe_open(path, framework="numpy") as file:
                tensors += len(file.keys())
            size += path.stat().st_size
        except PermissionError:
            raise ModelLoadError(
                f"{path} may not be read by the service's user: change its owner or its mode"
            ) from None
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{path} is corrupt or truncated ({one_line(error)}): "
                "delete it and download it again"
            ) from None
    _check_sizes(config, sizes, layers=tensors, size=size)


def _check_adapter(directory: Path) -> None:
    """Refuse a PEFT adapter (LoRA and others), alone or beside a model that it would change."""
    path = directory / "adapter_config.json"
    if not path.is_file():
        return
    config = _read_object(path)
    kind, base = config.get("peft_type", "PEFT"), config.get("base_model_name_or_path")
    alone = not (directory / "config.json").is_file()
    raise ModelLoadError(
        f"{directory} holds a {kind} adapter of {base or 'a model that it does not name'}, and "
        "adapters are not applied: merge it into its base with peft's merge_and_unload() and set "
        "MODEL__NAME to the merged model, "
        + (f"or to {base}" if alone else f"or delete {path.name} to serve the model without it")
    )


def _check_sizes(path: Path, config: Mapping[str, Any], *, layers: int, size: int) -> None:
    """Refuse sizes that the weights cannot have, because a library takes memory for them first.

    ``layers`` is the most that there can be, as each has a tensor; ``size`` is the weights' bytes.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for name, value in part.items():
            if not (named := _SIZE.search(name)) or not isinstance(value, int | float | str):
                continue
            most = layers if named[1] else MAX_SIZE
            if isinstance(value, str) or not 0 <= value <= most:
                raise _absurd(path, f"its {name} is not a number from 0 to {most}")
        for name in ("vocab_size", "intermediate_size"):
            matrix = [n for n in (part.get(name), part.get("hidden_size")) if isinstance(n, int)]
            if prod(matrix) > size * _WEIGHTS_PER_BYTE:
                raise _absurd(path, f"its {name} times hidden_size is more than its weights")


def _absurd(path: Path, why: str) -> ModelLoadError:
    return ModelLoadError(
        f"{path} is corrupt, since {why}: download it again, or choose another model"
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} is corrupt: delete it and download it again")
    return value


def _check_shards(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return
    weight_map = _read_object(index).get("weight_map")
    shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    for name in shards:
        _check_link(directory / name, directory)
    missing = sorted(name for name in shards if not (directory / name).is_file())
    if missing:
        raise ModelLoadError(
            f"{directory} lacks {missing[0]}, one of {len(shards)} files that its index names "
            f"({len(missing)} missing): download it again"
        )
