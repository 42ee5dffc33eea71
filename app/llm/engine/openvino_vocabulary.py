"""A tokenizer for OpenVINO's pipelines that knows a vocabulary, and nothing else.

The service encodes and decodes text itself; of a pipeline's tokenizer only grammars need something,
which is what each token stands for. The library's own tokenizer of a GGUF file takes most of the
time that such a model takes to load: it spells out every merge, of which nothing here makes use.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
import openvino_genai
from openvino import opset13 as ops

from app.llm.description import Vocabulary


def vocabulary_tokenizer(vocabulary: Vocabulary) -> openvino_genai.Tokenizer:
    """A tokenizer that cannot encode or decode, and whose vocabulary grammars can be compiled for.

    The library finds a vocabulary by a node's name, ``VocabDecoder``, in a detokenizer's graph: its
    second to fourth inputs are where each token begins and ends, and the bytes of all of them. What
    the node does with them is not looked at, so it is one of the operations that OpenVINO has.
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
            # Its spelling is given, or the library would ask the graph to decode it.
            spelling = vocabulary.tokens[vocabulary.eos].decode(errors="replace")
            names = {"eos_token": {"content": spelling}}
            (folder / "special_tokens_map.json").write_text(json.dumps(names))
        return openvino_genai.Tokenizer(folder)


def _row(values: np.ndarray) -> Any:
    return ops.constant(values.astype(np.int64)[None, :])
