"""Chooses the precision of a model's weights on a CPU, and refuses what does not fit."""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from safetensors import safe_open
from transformers import AutoConfig

from app.core.config import ModelSettings
from app.core.machine import available_memory
from app.llm.engine.cache_size import TOKENS_PER_REQUEST, WORTH_QUANTIZING
from app.llm.engine.transformers.gguf import is_unpacked_by_tensor
from app.llm.models.description import (
    cache_values_per_token,
    context_length,
    gguf_shape,
    pretrained_source,
)
from app.llm.models.gguf_header import GgufHeader
from app.llm.models.load_errors import quantization_method
from app.llm.models.snapshot import Snapshot
from app.utils.errors import ModelLoadError

# From this number of weights on, 16 bits are slower than callers of a CPU bear.
LARGE: Final = 1_000_000_000
# Bytes of a weight with its share of scales, of OpenVINO's and of this process's own memory, as
# measured with Gemma 2 2B.
_BYTES: Final = {8: 1.3, 4: 0.85}
_BITS: Final = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Choice:
    """How the weights are kept: in integers of 8 or 4 ``bits``, or in the model's dtype with 0."""

    bits: int
    reason: str


def choose_weights_precision(
    settings: ModelSettings,
    snapshot: Snapshot,
    header: GgufHeader | None,
    *,
    max_running: int,
    weight_bytes: int,
) -> Choice:
    """Choose what ``model.quantization`` leaves open, by the number of weights and free memory.

    Args:
        settings: The ``model`` section.
        snapshot: The model's files.
        header: That of a GGUF file.
        max_running: Most requests in a batch.
        weight_bytes: Bytes of a weight that is not quantized.

    Raises:
        ModelLoadError: Weights and cache do not fit into the free memory.
    """
    shapes = header.shapes.values() if header else _shapes(snapshot)
    *rest, table = sorted(map(math.prod, shapes)) or [0]
    count = sum(rest) + table
    whole = count * float(weight_bytes)
    needs = {0: whole}
    floats = sum(size for size in rest if size < WORTH_QUANTIZING)
    for bits, size in _BYTES.items():
        # The largest is the embedding or the output layer; the first stays in its file.
        small = table * _BYTES[8] + (count - table - floats) * size + 4.0 * floats
        if header:
            # Its embedding is unpacked; of some kinds all weights are, before they are rounded.
            small += 2.0 * table
            small = small if is_unpacked_by_tensor(header) else max(small, 2.0 * count)
        needs[bits] = small
    tokens, cache = _cache(snapshot, header, max_running, max(2, weight_bytes))
    free = available_memory()
    wanted = _wanted(settings, snapshot, count)
    fitting = [bits for bits in wanted if needs[bits] + cache <= free]
    if not fitting:
        bits = wanted[-1]
        smaller = [b for b in (8, 4) if b not in wanted and needs[b] + cache <= free]
        helps = f"set MODEL__QUANTIZATION=int{smaller[0]}, " if smaller else ""
        raise ModelLoadError(
            f"{settings.label} takes {needs[bits] / 1e9:.1f} GB for its weights in "
            f"{_precision(bits, weight_bytes)} and {cache / 1e9:.1f} GB for the cache of {tokens} "
            f"tokens, and {free / 1e9:.1f} GB are free: {helps}raise the memory limit, or choose a "
            "smaller model"
        )
    bits = fitting[0]
    memory = (
        f"{needs[bits] / 1e9:.1f} GB, and {cache / 1e9:.1f} GB for a cache of {tokens:,} tokens"
    )
    if settings.quantization != "auto":
        return Choice(bits, f"model.quantization is {settings.quantization}: {memory}")
    reason = f"it has {count / 1e9:.2g} billion parameters"
    if bits != wanted[0]:
        reason += (
            f", and {_precision(wanted[0], weight_bytes)} does not fit into {free / 1e9:.1f} GB"
        )
    return Choice(bits, f"{reason}: {memory}")


def _wanted(settings: ModelSettings, snapshot: Snapshot, count: int) -> list[int]:
    """Bits that may be taken, the best ones first."""
    if settings.quantization != "auto":
        return [_BITS.get(settings.quantization, 0)]
    if quantization_method(snapshot):
        return [0]
    return [8, 4] if count > LARGE else [0, 8, 4]


def _precision(bits: int, weight_bytes: int) -> str:
    return f"int{bits}" if bits else f"{8 * weight_bytes} bits"


def _shapes(snapshot: Snapshot) -> Iterator[list[int]]:
    for path in snapshot.directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield file.get_slice(name).get_shape()


def _cache(
    snapshot: Snapshot, header: GgufHeader | None, max_running: int, value_bytes: int
) -> tuple[int, float]:
    """Tokens and bytes of the least cache; 0 where the files do not say it."""
    with suppress(Exception):
        if header:
            shape = gguf_shape(header)
            context, values = shape.context_length, shape.cache_values_per_token
        else:
            config = AutoConfig.from_pretrained(snapshot.directory, **pretrained_source(snapshot))  # nosec B615
            context, values = context_length(config), cache_values_per_token(config)
        tokens = min(context, max_running * TOKENS_PER_REQUEST)
        return tokens, float(tokens * values * value_bytes)
    return 0, 0.0
