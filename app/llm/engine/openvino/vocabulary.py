"""A tokenizer for OpenVINO's pipelines that has a vocabulary and nothing else.

The service encodes and decodes text itself. Only grammars use a pipeline's tokenizer, and they need
only the bytes of each token. The library's own tokenizer of a GGUF file takes most of the model's
loading time (ADR 22), because it expands all merges, which are not needed here.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
import openvino_genai
from openvino import opset13 as ops

from app.llm.models.description import Vocabulary


def vocabulary_tokenizer(vocabulary: Vocabulary) -> openvino_genai.Tokenizer:
    """A tokenizer that grammars can be compiled for, and that cannot encode or decode.

    The library finds the vocabulary by the node name ``VocabDecoder`` in the detokenizer's graph.
    The node's second to fourth inputs are the tokens' start offsets, their end offsets and the
    bytes of all tokens. The library ignores the node's operation, so any operation will do.
    """
    ends = np.cumsum([len(token) for token in vocabulary.tokens])
    begins = np.concatenate([[0], ends[:-1]])
    characters = np.frombuffer(b"".join(vocabulary.tokens), dtype=np.uint8)
    ids = ops.parameter([1, -1], np.int64)
    inputs = [ids, *map(_row, (begins, ends, characters))]
    model = openvino.Model([ops.concat(inputs, 1, name="VocabDecoder")], [ids], "vocabulary")
    with TemporaryDirectory() as directory:
        folder = Path(directory)
        openvino.serialize(model, folder / "openvino_detokenizer.xml")
        if vocabulary.eos is not None:
            (folder / "config.json").write_text(json.dumps({"eos_token_id": vocabulary.eos}))
            # Without its text the library would run the graph to decode it.
            spelling = vocabulary.tokens[vocabulary.eos].decode(errors="replace")
            names = {"eos_token": {"content": spelling}}
            (folder / "special_tokens_map.json").write_text(json.dumps(names))
        return openvino_genai.Tokenizer(folder)


def _row(values: np.ndarray) -> Any:
    return ops.constant(values.astype(np.int64)[None, :])
