"""Vocabularies of GGUF files, read in two ways."""

from pathlib import Path

from app.llm.models.description import gguf_vocabulary
from app.llm.models.gguf_header import read_header


def own_and_librarys_vocabulary(path: Path) -> list[tuple[dict[str, int], int]]:
    """A GGUF file's vocabulary and end-of-sequence token: ours, and as OpenVINO reads them."""
    import openvino_genai

    from app.llm.engine.openvino.vocabulary import vocabulary_tokenizer

    vocabulary = gguf_vocabulary(read_header(path))
    assert vocabulary is not None
    both = vocabulary_tokenizer(vocabulary), openvino_genai.Tokenizer(str(path))
    return [(tokenizer.get_vocab(), tokenizer.get_eos_token_id()) for tokenizer in both]
