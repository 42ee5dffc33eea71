"""Loading a GGUF file with transformers, which ignores parts of its header.

What the header says of positions, attention and biases is written into the configuration before the
weights are loaded. What cannot be honoured is refused: the answers would be wrong.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers import modeling_gguf_pytorch_utils as legacy
from transformers.integrations import gguf as integration
from transformers.quantizers import quantizer_gguf

from app.core.logging import get_logger
from app.llm.models.gguf_header import GgufHeader

log = get_logger("engine")

_FREQUENCIES: Final = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
# Keys below rope.scaling that are read, and those that say nothing with a value of their own.
_SCALING = {"type", "factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow"}
_NEUTRAL = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0}
# Keys of the tokenizer that are large, and that transformers does not need for the model.
_VOCABULARY = re.compile(r"tokenizer\.ggml\.(?:tokens|token_type|scores|merges)")
_NUMBERS: dict[type, int] = {int: 5, float: 6, bool: 7}
# Tensors with a row for each token of the vocabulary, and rows that are unpacked at a time.
_TABLES = {"token_embd.weight", "output.weight"}
_ROWS = 4096
# transformers' classes that make one weight of one tensor.
_ONE_TO_ONE = {
    legacy.TensorProcessor,
    legacy.LlamaTensorProcessor,
    legacy.Gemma2TensorProcessor,
    legacy.NemotronTensorProcessor,
}


def is_unpacked_by_tensor(header: GgufHeader) -> bool:
    """Whether weights become integers one by one; else all are unpacked to 16 bits before."""
    return _processor(header) in _ONE_TO_ONE


def _processor(header: GgufHeader) -> Any:
    name = header.metadata.get("general.architecture")
    return legacy.TENSOR_PROCESSORS.get(name, legacy.TensorProcessor)


class GgufModel:
    """A GGUF file of which the header was read."""

    def __init__(self, path: Path, header: GgufHeader) -> None:
        self._path = path
        self._header = header
        self._architecture = str(header.metadata.get("general.architecture"))
        self._is_unpacked_by_tensor = False

    @contextmanager
    def read_once(self) -> Iterator[None]:
        """Let transformers take the file from the header that was read.

        It parses the file for the configuration and again for the weights, string by string, and
        builds the map of tensor names for each module of the model.
        """
        patches: list[tuple[Any, str, Any]] = [
            (gguf, "GGUFReader", lru_cache(maxsize=1)(lambda *_: self._reader())),
            (gguf, "get_tensor_name_map", lru_cache(maxsize=1)(gguf.get_tensor_name_map)),
            (integration, "read_gguf_metadata", lambda *_: self._metadata()),
            (quantizer_gguf, "read_gguf_metadata", lambda *_: self._metadata()),
        ]
        originals = [getattr(module, name) for module, name, _ in patches]
        for module, name, ours in patches:
            setattr(module, name, ours)
        try:
            yield
        finally:
            for (module, name, _), original in zip(patches, originals, strict=True):
                setattr(module, name, original)

    def _metadata(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """What ``read_gguf_metadata`` returns for a model: an array of strings is its length."""
        metadata = {
            key: len(value)
            if isinstance(value, list) and value and isinstance(value[0], str)
            else value
            for key, value in self._header.metadata.items()
        }
        return metadata, tuple(self._header.shapes)

    def _reader(self) -> SimpleNamespace:
        """What transformers uses of ``gguf.GGUFReader``."""
        metadata = {
            key: value
            for key, value in self._header.metadata.items()
            if not _VOCABULARY.fullmatch(key)
        }
        # transformers would count the vocabulary.
        metadata.setdefault(
            f"{self._architecture}.vocab_size", self._header.shapes["token_embd.weight"][0]
        )
        tensors = [self._tensor(name) for name in self._header.shapes]
        return SimpleNamespace(
            fields={key: _field(value) for key, value in metadata.items()}, tensors=tensors
        )

    def _tensor(self, name: str) -> SimpleNamespace:
        tensor = self._header.tensors[name]
        kind = gguf.GGMLQuantizationType(tensor.kind)
        shape = gguf.quant_shape_to_byte_shape(self._header.shapes[name], kind)
        begin = self._header.data + tensor.offset
        data = np.memmap(self._path, np.uint8, "r", begin, shape)
        return SimpleNamespace(name=name, tensor_type=kind, data=data)

    def _key(self, name: str) -> str:
        return f"{self._architecture}.{name}"

    def _value(self, name: str) -> Any:
        return self._header.metadata.get(self._key(name))

    # --- The configuration ------------------------------------------------------------------------

    def complete(self, config: Any) -> None:
        """Write into a configuration what the header says and transformers ignores.

        Raises:
            ValueError: It cannot be honoured.
        """
        for name, part in (("attention_bias", r"attn_\w+"), ("mlp_bias", r"ffn_\w+")):
            if hasattr(config, name):
                pattern = re.compile(rf"blk\.\d+\.{part}\.bias")
                setattr(config, name, any(map(pattern.fullmatch, self._header.shapes)))
        if scaling := self._frequencies() or self._scaling():
            parameters = config.rope_parameters
            # Gemma 3 scales the layers with full attention only.
            target = parameters.get("full_attention", parameters)
            target.update(scaling)
            if scaling.get("short_factor") != scaling.get("long_factor"):
                # Requests of one batch would be given the factors of the longest one.
                self._shorten(config, scaling["original_max_position_embeddings"], "rope_factors")
        window = self._value("attention.sliding_window")
        if window and window < config.max_position_embeddings:
            if hasattr(config, "sliding_window") and not hasattr(config, "layer_types"):
                config.sliding_window = window
            elif getattr(config, "sliding_window", None) != window:
                # Within the window, attention to all tokens is the same.
                self._shorten(config, window, self._key("attention.sliding_window"))

    def _shorten(self, config: Any, length: int, key: str) -> None:
        log.warning("%s: the context is %d tokens, by %s", self._path, length, key)
        config.max_position_embeddings = length

    def _frequencies(self) -> dict[str, Any] | None:
        """Divisors of each frequency that the file holds as tensors (Llama 3.1, Phi 3)."""
        both, *short_long = (self._divisors(name) for name in _FREQUENCIES)
        short, long = (both, both) if both else short_long
        if not short or not long:
            return None
        original = self._value("rope.scaling.original_context_length")
        return {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "attention_factor": self._value("rope.scaling.attn_factor") or 1.0,
            "original_max_position_embeddings": original or self._value("context_length"),
        }

    def _divisors(self, name: str) -> list[float] | None:
        if name not in self._header.shapes:
            return None
        tensor = self._tensor(name)
        values: list[float] = gguf.dequantize(tensor.data, tensor.tensor_type).ravel().tolist()
        if 2 * len(values) != self._value("rope.dimension_count"):
            raise ValueError(f"{name} has {len(values)} values, which are not half of a head's")
        return values

    def _scaling(self) -> dict[str, Any] | None:
        kind, factor = self._value("rope.scaling.type"), self._value("rope.scaling.factor")
        if kind == "none" or not factor:
            return None
        prefix = self._key("rope.scaling.")
        for key, value in self._header.metadata.items():
            name = key.removeprefix(prefix)
            known = name in _SCALING or name == "finetuned" or value == _NEUTRAL.get(name)
            if key.startswith(prefix) and not known:
                raise ValueError(f"its {key} is {value}, which no engine honours")
        if kind in (None, "linear"):
            return {"rope_type": "linear", "factor": factor}
        original = self._value("rope.scaling.original_context_length")
        if kind != "yarn" or not original:
            raise ValueError(f"its {prefix}type is {kind}, which no engine honours")
        betas = {
            f"beta_{speed}": value
            for speed in ("fast", "slow")
            if (value := self._value(f"rope.scaling.yarn_beta_{speed}"))
        }
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            **betas,
        }

    # --- The weights ------------------------------------------------------------------------------

    def unread_weights(self, config: Any, dtype: torch.dtype) -> dict[str, Any]:
        """The model's class, and its weights as ``state_dict``, each unpacked when it is indexed.

        Returns:
            Nothing where transformers makes a weight of several tensors.
        """
        if not is_unpacked_by_tensor(self._header):
            return {}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        processor = _processor(self._header)(config=config.to_dict())
        names = legacy.get_gguf_hf_weights_map(model, processor)
        unread = {
            names.get(name, name): _Unread(partial(self._tensor, name), processor, dtype)
            for name in self._header.shapes
            if name not in _FREQUENCIES
        }
        self._is_unpacked_by_tensor = True
        return {"class": type(model), "state_dict": unread}

    def check_tensors(self, model: Any, report: dict[str, Any]) -> None:
        """Refuse tensors that the model does not use.

        Raises:
            ValueError: It names the tensor.
        """
        unused = sorted(set(report["unexpected_keys"]) or self._unused(model))
        if unused:
            raise ValueError(
                f"transformers ignores {len(unused)} of its tensors, {unused[0]} for one"
            )

    def _unused(self, model: Any) -> set[str]:
        if self._architecture in integration.GGUF_ARCHS or self._is_unpacked_by_tensor:
            return set()
        processor = _processor(self._header)(config=model.config.to_dict())
        used = set(legacy.get_gguf_hf_weights_map(model, processor))
        used |= {f"{name}.weight" for name in used} | set(_FREQUENCIES)
        if model.config.tie_word_embeddings:
            used.add("output.weight")
        return set(self._header.shapes) - used


class _Unread:
    """A tensor of the file that is read when transformers indexes it, as it does with a slice."""

    def __init__(self, read: Callable[[], Any], processor: Any, dtype: torch.dtype) -> None:
        # The file is mapped only while a tensor is read: its pages count as memory of the process.
        self._read = read
        self._processor = processor
        self._dtype = dtype

    def __getitem__(self, _: Any) -> torch.Tensor:
        tensor = self._read()
        if tensor.name in _TABLES:
            return self._in_parts(tensor)
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        weights = self._processor.process(weights=values, name=tensor.name).weights
        return torch.from_numpy(np.array(weights)).to(self._dtype)

    def _in_parts(self, tensor: Any) -> torch.Tensor:
        """A table, which no class changes, so that little of it is in float32 at a time."""
        parts = (
            gguf.dequantize(tensor.data[row : row + _ROWS], tensor.tensor_type)
            for row in range(0, len(tensor.data), _ROWS)
        )
        return torch.cat([torch.from_numpy(np.array(part)).to(self._dtype) for part in parts])


def _field(value: Any) -> SimpleNamespace:
    """What transformers uses of ``gguf.ReaderField``."""
    values = value if isinstance(value, list) else [value]
    strings = bool(values) and isinstance(values[0], str)
    kind = 8 if strings else _NUMBERS[type(values[0])] if values else 5
    return SimpleNamespace(
        parts=[v.encode() if strings else [v] for v in values],
        types=[9, kind] if isinstance(value, list) else [kind],
        data=range(len(values)),
    )
