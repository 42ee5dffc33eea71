"""Loading a model with OpenVINO, without torch in this process."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from app.core.config import ModelSettings
from app.core.logging import get_logger
from app.core.machine import compute_threads
from app.llm.engine.cache_size import cache_tokens
from app.llm.engine.openvino.converted import NotConvertedError, convert_once
from app.llm.engine.openvino.gguf import why_not_read
from app.llm.models.description import (
    ModelShape,
    UnknownShapeError,
    gguf_shape,
    gguf_vocabulary,
    json_vocabulary,
    read_gguf,
)
from app.llm.models.gguf_header import GgufHeader
from app.llm.models.load_errors import one_line
from app.llm.models.progress import Progress
from app.llm.models.recommended_sampling import recommended_sampling
from app.llm.models.snapshot import Snapshot
from app.llm.models.tokenizer_process import TokenizerProcess
from app.llm.prefix_index import BLOCK_SIZE
from app.llm.protocol import Backend, EngineInfo
from app.utils.errors import ModelLoadError

log = get_logger("engine")

OPENVINO_REASONS = {
    "openvino": "model.engine is openvino",
    "auto": "model.engine is auto, and OpenVINO is the fastest on a CPU",
}
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
# Bytes of a value in the cache. The plugin's default is 8 bits and a scale for each group.
_CACHE_BYTES = {"float32": 4.0, "auto": 1.25}
_CACHE_BYTES_16 = 2.0


class OpenVinoUnsupportedError(Exception):
    """OpenVINO cannot run this model; another engine might."""


def load_openvino(
    settings: ModelSettings, snapshot: Snapshot, *, max_running: int, progress: Progress
) -> Backend:
    """Load a GGUF file, an OpenVINO model, or safetensors, which are converted to one.

    ``max_running`` is the most requests in a batch.

    Raises:
        OpenVinoUnsupportedError: OpenVINO cannot run it, though its files are complete.
        ModelLoadError: Its files are incomplete, or its tokenizer cannot be read.
    """
    if snapshot.weights is None:
        try:
            snapshot = convert_once(settings, snapshot, progress)
        except NotConvertedError as error:
            raise OpenVinoUnsupportedError(str(error)) from error
    progress(f"loading {settings.label} with OpenVINO")
    with TokenizerProcess(settings, snapshot) as reader:
        header = read_gguf(settings, snapshot) if snapshot.gguf else None
        keep_telemetry_out()
        try:
            shape = check_gguf(header) if header else None
            # This import takes time, and the other process reads the tokenizer meanwhile.
            from app.llm.engine.openvino.backend import SUPPORTED, OpenVinoBackend, start_pipeline

            shape = shape or reader.shape()
            blocks = _cache_blocks(settings, shape, max_running)
            with _readable(snapshot, header, progress) as path:
                pipeline = start_pipeline(
                    path,
                    tokenizer=_vocabulary(snapshot, header, shape),
                    max_running=max_running,
                    cache_blocks=blocks,
                    properties=_properties(settings, shape),
                )
        except (ModelLoadError, OpenVinoUnsupportedError):
            raise
        except Exception as error:
            # The library raises errors of many kinds, IndexError for one.
            raise OpenVinoUnsupportedError(_reason(error)) from error
        tokenizer = reader.tokenizer()
    info = EngineInfo(
        model=settings.label,
        revision=snapshot.revision,
        backend="openvino",
        backend_reason=OPENVINO_REASONS[settings.engine],
        device="cpu",
        dtype=shape.weights,
        context_length=shape.context_length,
        vocabulary_size=shape.vocabulary_size,
        supported=SUPPORTED,
        tokenizer_json=tokenizer.tokenizer_json,
        chat_template=tokenizer.chat_template,
        special_tokens=tokenizer.special_tokens,
        sampling=recommended_sampling(snapshot, header, SUPPORTED),
    )
    return OpenVinoBackend(
        pipeline, info, eos_token_ids=tokenizer.eos_token_ids, cache_blocks=blocks
    )


def check_gguf(header: GgufHeader) -> ModelShape:
    """The shape of a model whose GGUF file OpenVINO reads as it is meant.

    Raises:
        OpenVinoUnsupportedError: It does not.
    """
    try:
        shape = gguf_shape(header)
    except UnknownShapeError as error:
        raise OpenVinoUnsupportedError(one_line(error)) from error
    if reason := why_not_read(header):
        raise OpenVinoUnsupportedError(reason)
    return shape


def _readable(
    snapshot: Snapshot, header: GgufHeader | None, progress: Progress
) -> AbstractContextManager[str]:
    """The path under which OpenVINO can read the model, inside the block."""
    if header is None:
        return nullcontext(str(snapshot.directory))
    # It imports gguf, which only an engine that loads a model may have in memory.
    from app.llm.engine.openvino.gguf_copy import loadable

    return loadable(snapshot.directory / str(snapshot.gguf), header, progress)


def _vocabulary(snapshot: Snapshot, header: GgufHeader | None, shape: ModelShape) -> Any:
    """A tokenizer with the model's vocabulary; ``None``: the library reads its own."""
    from app.llm.engine.openvino.vocabulary import vocabulary_tokenizer

    if header:
        vocabulary = gguf_vocabulary(header)
    else:
        vocabulary = json_vocabulary(snapshot.directory / "tokenizer.json", shape.vocabulary_size)
    try:
        return vocabulary_tokenizer(vocabulary) if vocabulary else None
    except OSError as error:
        # There is no folder for temporary files. The library's tokenizer takes a second longer.
        log.warning("the library reads the vocabulary, which takes longer: %s", one_line(error))
        return None


def keep_telemetry_out() -> None:
    """Make ``import openvino`` fail to import ``openvino_telemetry``, which is optional.

    That package reports each start to Google Analytics from a forked process, and stores an id in
    the home directory.
    """
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


def _properties(settings: ModelSettings, shape: ModelShape) -> dict[str, Any]:
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": compute_threads(os.environ)}
    if settings.dtype == "auto" and shape.weights in {"int8", "int4"}:
        # The plugin multiplies integers only where it computes the rest in float32. In bfloat16 it
        # unpacks the weights in each step, see ADR 14.
        properties["INFERENCE_PRECISION_HINT"] = "f32"
    if precision := _PRECISIONS.get(settings.dtype):
        properties["INFERENCE_PRECISION_HINT"] = precision
        properties["KV_CACHE_PRECISION"] = precision
    return properties


def _cache_blocks(settings: ModelSettings, shape: ModelShape, max_running: int) -> int:
    value_bytes = _CACHE_BYTES.get(settings.dtype, _CACHE_BYTES_16)
    tokens = cache_tokens(
        context_length=shape.context_length,
        max_running=max_running,
        bytes_per_token=shape.cache_values_per_token * value_bytes,
    )
    return -(-tokens // BLOCK_SIZE) + 1


def _reason(error: Exception) -> str:
    """The library's message without the paths of its source files."""
    if isinstance(error, ImportError):
        return f"it is not installed ({one_line(error)})"
    if isinstance(error, UnknownShapeError | OSError):
        return one_line(error)
    lines = [line for line in str(error).splitlines() if line.strip()]
    messages = [line for line in lines if not line.startswith(("Exception from", "Check "))]
    return one_line(RuntimeError((messages or lines or ["it gave no reason"])[-1]))[:200]
