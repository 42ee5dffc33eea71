"""Loading a model with vLLM, in the environment that ``engine.python`` names."""

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from app.core.config import ModelSettings
from app.core.machine import THREADS_VARIABLE
from app.llm.engine.cache_size import cache_tokens
from app.llm.models.description import (
    cache_values_per_token,
    context_length,
    pretrained_source,
    read_tokenizer,
)
from app.llm.models.load_errors import explaining, is_out_of_memory, one_line
from app.llm.models.progress import Progress
from app.llm.models.recommended_sampling import recommended_sampling
from app.llm.models.snapshot import Snapshot
from app.llm.prefix_index import BLOCK_SIZE
from app.llm.protocol import Backend, EngineInfo
from app.utils.errors import ModelLoadError

_VARIABLES = {
    # vLLM's scheduler runs in this process, which is the engine process already.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # A forked helper could not use CUDA.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Its messages go to our log; by default it writes to standard output.
    "VLLM_CONFIGURE_LOGGING": "0",
    # It would report each start.
    "VLLM_NO_USAGE_STATS": "1",
}
# What the settings of this service and its security decide.
_OURS = ("model", "tokenizer", "revision", "tokenizer_revision", "trust_remote_code")
# Bytes of a value in the cache of a CPU.
_CACHE_BYTES = {"float32": 4.0}
_CACHE_BYTES_16 = 2.0


def load_vllm(
    settings: ModelSettings,
    snapshot: Snapshot,
    reason: str,
    arguments: dict[str, Any],
    *,
    max_running: int,
    progress: Progress,
) -> Backend:
    """Load safetensors with vLLM.

    Args:
        settings: The ``model`` section.
        snapshot: The model's files.
        reason: Why vLLM runs it, for /status.
        arguments: Arguments for vLLM, by the fields of its ``EngineArgs``.
        max_running: Most requests in a batch.
        progress: Called with each step of loading.

    Raises:
        ModelLoadError: vLLM is not installed, does not know an argument, or cannot run the model.
    """
    _set_variables(settings, arguments)
    progress("importing vLLM")
    try:
        from vllm import EngineArgs, LLMEngine

        from app.llm.engine.vllm.backend import SUPPORTED, CacheUsage, VllmBackend
    except Exception as error:
        raise ModelLoadError(
            f"vLLM cannot be imported ({one_line(error)[:200]}): run make install-vllm again"
        ) from error
    _check_arguments(arguments, [field.name for field in fields(EngineArgs)])
    tokenizer = read_tokenizer(settings, snapshot)
    usage = CacheUsage()
    progress(f"loading {settings.label} with vLLM")
    with _explaining(settings), _telling(progress):
        engine = LLMEngine.from_engine_args(
            EngineArgs(**_defaults(settings, snapshot, arguments, max_running) | arguments),
            stat_loggers=[lambda *_: usage],
        )
    model = engine.model_config
    info = EngineInfo(
        model=settings.label,
        revision=snapshot.revision,
        backend="vllm",
        backend_reason=reason,
        device=_device(settings),
        dtype=model.quantization or str(model.dtype).removeprefix("torch."),
        context_length=model.max_model_len,
        vocabulary_size=model.get_vocab_size(),
        supported=SUPPORTED,
        tokenizer_json=tokenizer.tokenizer_json,
        chat_template=tokenizer.chat_template,
        special_tokens=tokenizer.special_tokens,
        sampling=recommended_sampling(snapshot, None, SUPPORTED),
    )
    return VllmBackend(engine, info, eos_token_ids=tokenizer.eos_token_ids, usage=usage)


def _set_variables(settings: ModelSettings, arguments: dict[str, Any]) -> None:
    os.environ.update(_VARIABLES)
    if _is_eager(settings, arguments):
        # vLLM would still compile single functions, for log-probabilities, which needs g++.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    if settings.device == "cuda":
        # On a GPU vLLM computes with one thread, unless the environment says otherwise.
        os.environ.pop(THREADS_VARIABLE, None)


def _is_eager(settings: ModelSettings, arguments: dict[str, Any]) -> bool:
    """Whether nothing is compiled: on a CPU that takes minutes at each start."""
    return bool(arguments.get("enforce_eager", settings.device == "cpu"))


def _check_arguments(arguments: dict[str, Any], known: list[str]) -> None:
    for name in arguments:
        if name in _OURS:
            raise ModelLoadError(f"engine.vllm_args may not set {name}, which this service decides")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ModelLoadError(
                f"engine.vllm_args has {name}, which is none of this vLLM's arguments{hint}"
            )


def _defaults(
    settings: ModelSettings, snapshot: Snapshot, arguments: dict[str, Any], max_running: int
) -> dict[str, Any]:
    """The arguments that differ from vLLM's own defaults."""
    values: dict[str, Any] = {
        "model": str(snapshot.directory),
        "trust_remote_code": False,
        "load_format": "safetensors",
        "dtype": settings.dtype,
        "max_num_seqs": max_running,
        "enable_prefix_caching": True,
        # The API has a limit of its own.
        "max_logprobs": -1,
        "seed": random.getrandbits(31),  # nosec B311
        # vLLM has one library for the grammars of all requests; by default the first one chooses.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    if settings.device == "cpu":
        values["enforce_eager"] = True
        # By default a block has 128 tokens, and only whole blocks are found again.
        values["block_size"] = BLOCK_SIZE
        if "gpu_memory_utilization" not in arguments:
            values["kv_cache_memory_bytes"] = _cache_bytes(
                settings, snapshot, arguments, max_running
            )
    return values


def _cache_bytes(
    settings: ModelSettings, snapshot: Snapshot, arguments: dict[str, Any], max_running: int
) -> int:
    """The KV cache of a CPU, of which vLLM would take nearly all memory."""
    from transformers import AutoConfig

    with explaining("configuration", settings, snapshot):
        config = AutoConfig.from_pretrained(snapshot.directory, **pretrained_source(snapshot))  # nosec B615
        size = cache_values_per_token(config) * _CACHE_BYTES.get(settings.dtype, _CACHE_BYTES_16)
        context = int(arguments.get("max_model_len") or context_length(config))
    tokens = cache_tokens(context_length=context, max_running=max_running, bytes_per_token=size)
    # vLLM keeps one block empty.
    return int((tokens + BLOCK_SIZE) * size)


def _device(settings: ModelSettings) -> str:
    if settings.device == "cpu":
        return "cpu"
    import torch

    return f"cuda ({torch.cuda.get_device_name()})"


@contextmanager
def _explaining(settings: ModelSettings) -> Iterator[None]:
    """Turn vLLM's errors into one line."""
    try:
        yield
    except ModelLoadError:
        raise
    except Exception as error:
        text = one_line(error)[:300]
        if is_out_of_memory(error) or "KV cache" in text:
            advice = (
                "set ENGINE__MAX_CONTEXT lower, ENGINE__TENSOR_PARALLEL_SIZE higher, or choose a "
                "smaller model"
            )
        else:
            advice = "choose another model, or set MODEL__ENGINE=transformers"
        raise ModelLoadError(f"vLLM cannot run {settings.label} ({text}): {advice}") from error


@contextmanager
def _telling(progress: Progress) -> Iterator[None]:
    """Report what vLLM logs while it loads; later its warnings alone are logged."""
    logger = logging.getLogger("vllm")
    handler = _Teller(progress)
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
        logger.setLevel(logging.WARNING)


class _Teller(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self._progress("vLLM: " + " ".join(record.getMessage().split())[:200])
