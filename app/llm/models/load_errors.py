"""Turns any library's error about a model's files into one line that says what to do."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from app.core.config import ModelSettings
from app.llm.models.snapshot import Snapshot
from app.utils.errors import ModelLoadError


@contextmanager
def explaining(part: str, settings: ModelSettings, snapshot: Snapshot) -> Iterator[None]:
    """Turn any exception of the block into a :class:`ModelLoadError`.

    ``part`` is what is being loaded: ``file``, ``configuration``, ``tokenizer`` or ``model``; or
    ``engine``, which starts with files that are whole.
    """
    try:
        yield
    except ModelLoadError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ModelLoadError(_explain(error, part, settings, snapshot)) from error


def is_failure(error: BaseException) -> bool:
    """Whether an error is a failure of a library; tokenizers raises the bare Exception.

    A panic of Rust code is a ``PanicException``, which is no Exception and cannot be imported.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


# Parts of transformers' errors about a kind of model that it cannot run.
_UNSUPPORTED = (
    "does not recognize this architecture",
    "Unrecognized configuration class",
    "not supported",
    "does not support",
)


def _explain(error: BaseException, part: str, settings: ModelSettings, snapshot: Snapshot) -> str:
    text = one_line(error)
    name = settings.label
    if "trust_remote_code" in text:
        return (
            f"{name} needs code from its repository to run, which is refused: choose another model"
        )
    if is_out_of_memory(error):
        return (
            f"{name} does not fit in this machine's {settings.device} memory: choose a smaller "
            "model, or MODEL__DTYPE=bfloat16"
        )
    if part in {"model", "engine"} and (method := quantization_method(snapshot)):
        needs_gpu = settings.device == "cpu" and "GPU" in text
        advice = (
            "set MODEL__DEVICE=cuda where there is one" if needs_gpu else "install what it needs"
        )
        return (
            f"{name} is quantized with {method}, which cannot run here ({text[:200]}): {advice}, "
            "or choose a repository with its unquantized weights or a GGUF file of it"
        )
    if any(words in text for words in _UNSUPPORTED):
        return (
            f"{name} is of a kind that transformers cannot serve ({text[:150]}): choose another "
            "model"
        )
    if isinstance(error, ImportError):
        return f"{name} needs a package ({text[:200]}): install it, or choose another model"
    if part == "engine":
        return f"{name} is whole, but cannot be loaded ({text[:200]}): choose another model"
    if snapshot.gguf:
        return (
            f"{snapshot.directory / snapshot.gguf} cannot be loaded ({text[:200]}): if it is "
            "truncated or corrupt, delete it and download it again"
        )
    needs = "config.json and safetensors files that belong together are needed"
    if part == "tokenizer":
        needs = "a whole tokenizer.json is needed; download it again"
        if (snapshot.directory / "tokenizer.model").is_file():
            needs = (
                "a whole tokenizer.json is needed, which save_pretrained of transformers makes of "
                "tokenizer.model where sentencepiece is installed"
            )
    return (
        f"the {part} in {snapshot.directory} cannot be loaded ({text[:200]}): {needs}, or choose "
        "another model"
    )


def quantization_method(snapshot: Snapshot) -> str | None:
    """The format of quantized safetensors, as config.json names it; else ``None``."""
    if snapshot.weights:
        return None
    config = json.loads((snapshot.directory / "config.json").read_text(encoding="utf-8"))
    found = config.get("quantization_config") or config.get("compression_config")
    return str(found.get("quant_method", "an unnamed method")) if isinstance(found, dict) else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory for what failed."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


def one_line(error: BaseException) -> str:
    """The message of an error, on one line."""
    return " ".join(str(error).split()) or repr(error)
