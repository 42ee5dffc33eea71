"""Grammars for the openvino backend: translated, and compiled before they reach the batch.

The library compiles a request's grammar within the step that chooses its first token, where an
error leaves the state of the whole batch undefined. It caches compiled grammars by tokenizer and
never evicts one. So a second pipeline with the same tokenizer and an empty model compiles each new
grammar before the request is added, and the step finds it in the cache. When the cache is full, a
pipeline with another vocabulary size makes the library drop it.
"""

import contextlib
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import msgspec
import numpy as np
import openvino
import openvino_genai
from openvino import opset13 as ops
from openvino_genai import GenerationConfig, StructuredOutputConfig

from app.llm.ebnf.errors import GrammarError
from app.llm.ebnf.grammars import to_ebnf
from app.llm.ebnf.writer import MOST_WRITTEN_OUT
from app.llm.protocol import Grammar

KEPT_BYTES: Final = 64 * 2**20
"""Size of the library's cache of compiled grammars, by :func:`kept_bytes`."""

# The estimate of a compiled grammar: the library does not tell its size. Measured by the growth of
# the process with 60 grammars and a vocabulary of 49,152: 10 to 200 bytes for a character of the
# text, up to 1,900 for a counted item of an array, and 0.1 to 0.3 MiB for the smallest.
_SMALLEST_BYTES = 256 * 1024
_BYTES_OF_CHARACTER = 200
_BYTES_OF_ITEM = 2_000
_VOCABULARY = 50_000


class GrammarCompiler:
    """Compiles grammars for one pipeline, on the thread that calls its steps.

    Args:
        tokenizer: The pipeline's own, not another one of the same model.
        eos: Tokens that end an answer.
    """

    def __init__(
        self, tokenizer: openvino_genai.Tokenizer, vocabulary_size: int, eos: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocabulary_size = vocabulary_size
        self._eos = eos
        # The text of each grammar in the library's cache, by the grammar's encoding.
        self._compiled: dict[bytes, str] = {}
        self._bytes = 0
        self._stand_in: openvino_genai.LLMPipeline | None = None

    def compile(self, grammar: Grammar) -> StructuredOutputConfig:
        """Compile a grammar for a request's configuration.

        Raises:
            GrammarError: It cannot be translated, or the library rejects it.
        """
        key = msgspec.msgpack.encode(grammar)
        if (known := self._compiled.get(key)) is not None:
            return StructuredOutputConfig(grammar=known)
        text = to_ebnf(grammar, self._vocabulary_size)
        config = StructuredOutputConfig(grammar=text)
        size = kept_bytes(text, self._vocabulary_size)
        if self._compiled and self._bytes + size > KEPT_BYTES:
            self._forget()
        if self._stand_in is None:
            self._stand_in = _stand_in(self._tokenizer, self._vocabulary_size)
        try:
            self._generate(self._stand_in, config)
        except RuntimeError as error:
            raise GrammarError("the library rejects it") from error
        self._compiled[key] = text
        self._bytes += size
        return config

    def _forget(self) -> None:
        """Make the library drop its cache, which it does for another vocabulary size.

        Running requests keep their own references.
        """
        other = _stand_in(self._tokenizer, self._vocabulary_size + 1)
        # If the vocabulary has no token for it, the generation fails after the cache is dropped.
        with contextlib.suppress(RuntimeError):
            self._generate(other, StructuredOutputConfig(regex="a"))
        self._compiled.clear()
        self._bytes = 0

    def _generate(self, pipeline: Any, structure: StructuredOutputConfig) -> None:
        config = GenerationConfig()
        config.apply_chat_template = False
        config.max_new_tokens = 1
        if self._eos:
            config.eos_token_id = min(self._eos)
            config.stop_token_ids = set(self._eos)
        config.structured_output_config = structure
        pipeline.generate(openvino.Tensor(np.zeros((1, 1), dtype=np.int64)), config)


def kept_bytes(text: str, vocabulary_size: int) -> int:
    """The estimated size of a compiled grammar, given its text."""
    items = sum(min(int(count), MOST_WRITTEN_OUT) for count in re.findall(r"[{,](\d{1,9})}", text))
    size = _SMALLEST_BYTES + _BYTES_OF_CHARACTER * len(text) + _BYTES_OF_ITEM * items
    return size * max(_VOCABULARY, vocabulary_size) // _VOCABULARY


def _stand_in(tokenizer: openvino_genai.Tokenizer, vocabulary_size: int) -> Any:
    """A pipeline whose model gives all tokens the same probability."""
    ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    mask = ops.parameter([-1, -1], np.int64, name="attention_mask")
    beams = ops.parameter([-1], np.int32, name="beam_idx")
    # The pipeline requires these inputs, and the library drops inputs that are not used.
    used = [ops.convert(ops.reduce_sum(p, axes), "f32") for p, axes in _axes(ids, mask, beams)]
    nothing = ops.multiply(ops.add(ops.add(*used[:2]), used[2]), ops.constant(np.float32(0)))
    shape = ops.concat([ops.shape_of(ids), ops.constant(np.array([vocabulary_size]))], 0)
    logits = ops.broadcast(nothing, shape)
    logits.output(0).set_names({"logits"})
    for parameter in (ids, mask, beams):
        parameter.output(0).set_names({parameter.friendly_name})
    model = openvino.Model([ops.result(logits)], [ids, mask, beams], "stand_in")
    xml, weights = _serialised(model)
    return openvino_genai.LLMPipeline(xml, weights, tokenizer, "CPU", ATTENTION_BACKEND="SDPA")


def _axes(*parameters: Any) -> list[tuple[Any, Any]]:
    return [(p, ops.constant(np.arange(len(p.partial_shape)))) for p in parameters]


def _serialised(model: openvino.Model) -> tuple[str, openvino.Tensor]:
    """A model's XML and weights, as pipelines take them; the library only writes files."""
    with TemporaryDirectory() as directory:
        xml = Path(directory, "model.xml")
        openvino.save_model(model, xml, compress_to_fp16=False)
        weights = np.frombuffer(xml.with_suffix(".bin").read_bytes(), dtype=np.uint8)
        return xml.read_text(encoding="utf-8"), openvino.Tensor(weights)
