"""A GGUF file's tokenizer is that of transformers, and a slow conversion is kept."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub import constants

from app.llm.models import gguf_tokenizer
from app.llm.models.gguf_header import GgufHeader, read_header
from app.llm.models.gguf_tokenizer import end_token_ids, load_gguf_tokenizer
from tests.support.tiny_gguf import make_tiny_gguf


@pytest.fixture(scope="module", params=[False, True], ids=["merges", "pieces"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file with each kind of vocabulary."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return make_tiny_gguf(path, sentencepiece=request.param)


@pytest.fixture
def header(path: Path) -> GgufHeader:
    """Its header."""
    return read_header(path)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which every conversion is kept."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(gguf_tokenizer, "KEEP_FROM_SECONDS", -1)
    return tmp_path / "home" / "gguf-tokenizers"


def contents(tokenizer: Any) -> tuple[Any, ...]:
    """All that the service takes from a tokenizer."""
    text = tokenizer.backend_tokenizer.to_str()
    return text, tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.eos_token_id


def never(*_: object) -> None:
    """In place of the conversion."""
    raise AssertionError("it was converted again")


def test_the_tokenizer_equals_that_of_transformers(
    path: Path, header: GgufHeader, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted and kept, it is what transformers reads, and it is converted once."""
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert contents(load_gguf_tokenizer(header)) == contents(reference)
    (file,) = kept.iterdir()
    monkeypatch.setattr(transformers.integrations.gguf, "convert_gguf_tokenizer", never)
    assert contents(load_gguf_tokenizer(header)) == contents(reference)
    assert list(kept.iterdir()) == [file]


def test_a_quick_conversion_is_not_kept(
    header: GgufHeader, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what takes long is written."""
    monkeypatch.setattr(gguf_tokenizer, "KEEP_FROM_SECONDS", 1000)
    load_gguf_tokenizer(header)
    assert not kept.exists()


def test_a_broken_file_is_replaced(header: GgufHeader, kept: Path) -> None:
    """A file that cannot be read, and one that a killed start left, do no harm."""
    whole = contents(load_gguf_tokenizer(header))
    (file,) = kept.iterdir()
    written = file.read_text()
    file.write_text(written[:100])
    (kept / "0.unfinished").write_text(written[:100])
    assert contents(load_gguf_tokenizer(header)) == whole
    assert file.read_text() == written


def test_a_folder_that_cannot_be_written(header: GgufHeader, tmp_path: Path, kept: Path) -> None:
    """Without a folder each start converts."""
    (tmp_path / "home").write_text("a file")
    assert len(load_gguf_tokenizer(header))
    assert not kept.exists()


def test_another_tokenizer_is_another_file(header: GgufHeader, kept: Path, tmp_path: Path) -> None:
    """Files that differ in what they say of the tokenizer do not share a conversion."""
    other = make_tiny_gguf(tmp_path / "other.gguf", template="other")
    for one in (header, read_header(other)):
        load_gguf_tokenizer(one)
    assert len(list(kept.iterdir())) == 2


def test_the_end_tokens() -> None:
    """The tokens that keys name end an answer, and control tokens with a known spelling."""
    metadata = {
        "tokenizer.ggml.tokens": ["a", "<|eot_id|>", "<|im_end|>", "b", "<s>", "c"],
        "tokenizer.ggml.token_type": [1, 3, 1, 1, 3, 1],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.eom_token_id": -1,
        "tokenizer.ggml.eot_token_id": 2**32 - 1,
        "tokenizer.ggml.eos_token_ids": [5, 3],
        "tokenizer.ggml.bos_token_id": 4,
    }
    assert end_token_ids(GgufHeader(metadata, {}, 0)) == {1, 3, 5}
    assert end_token_ids(GgufHeader({}, {}, 0)) == frozenset()
