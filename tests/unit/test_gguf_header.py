"""The header of a GGUF file is read correctly, and never beyond the end of the file."""

import struct
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from app.llm.models.description import ModelShape, UnknownShapeError, gguf_shape
from app.llm.models.gguf_header import GgufHeader, read_header
from tests.support import tiny_model
from tests.support.tiny_gguf import make_tiny_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole GGUF file."""
    return make_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_the_header_equals_the_reference_readers(path: Path) -> None:
    """Every key and tensor is the same as in the library that writes these files."""
    header = read_header(path)
    reference = GGUFReader(path)
    values = {k: f.contents() for k, f in reference.fields.items() if not k.startswith("GGUF.")}
    arrays = {k: v for k, v in values.items() if isinstance(v, list)}
    assert {k: header.metadata[k] for k in arrays} == arrays
    others = {k: v for k, v in header.metadata.items() if k not in arrays}
    assert others == pytest.approx({k: v for k, v in values.items() if k not in arrays})
    assert {t.name: tuple(map(int, reversed(t.shape))) for t in reference.tensors} == header.shapes
    assert header.end == max(t.data_offset + t.n_bytes for t in reference.tensors)


def test_a_truncated_file_is_rejected(path: Path, tmp_path: Path) -> None:
    """A file is rejected wherever it is truncated."""
    whole = path.read_bytes()
    end = read_header(path).end
    cut = tmp_path / "cut.gguf"
    for size in [*range(1, 20_000, 997), end // 2, end - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^it"):
            read_header(cut)


_COUNTS = {
    "keys": struct.pack("<QQ", 0, 2**60),
    "tensors": struct.pack("<QQ", 2**60, 0),
    "string": struct.pack("<QQQ", 0, 1, 2**60),
    "strings": struct.pack("<QQQ1sIIQ", 0, 1, 1, b"a", 9, 8, 2**60),
    "numbers": struct.pack("<QQQ1sIIQ", 0, 1, 1, b"a", 9, 4, 2**60),
    "arrays": struct.pack("<QQQ1sIIQ", 0, 1, 1, b"a", 9, 9, 2**60),
    "dimensions": struct.pack("<QQQ1sI", 1, 0, 1, b"a", 2**31),
    "five dimensions": struct.pack("<QQQ1sI", 1, 0, 1, b"a", 5),
}


@pytest.mark.parametrize("header", _COUNTS.values(), ids=_COUNTS)
def test_absurd_counts_are_refused_before_anything_is_read(tmp_path: Path, header: bytes) -> None:
    """A count that no model has is refused, also in a file that is long enough to read for ever."""
    path = tmp_path / "absurd.gguf"
    with path.open("wb") as file:
        file.write(b"GGUF\x03\0\0\0" + header)
        # A sparse file of zeros, which are empty strings and empty arrays.
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"^its header counts \d+ elements, and at most \d+ are"):
        read_header(path)


@given(st.binary(min_size=1, max_size=300))
def test_any_bytes_are_an_error_of_one_kind(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    """Garbage raises ValueError, also after the right magic and version."""
    file = tmp_path_factory.getbasetemp() / "any.gguf"
    for content in (data, b"GGUF\x03\0\0\0" + data):
        file.write_bytes(content)
        try:
            header = read_header(file)
        except ValueError:
            continue
        # Few bytes can be a valid header.
        assert content.startswith(b"GGUF")
        assert header.end <= len(content)


# --- The model's shape ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def header(path: Path) -> GgufHeader:
    """The header of the whole file."""
    return read_header(path)


def changed(header: GgufHeader, key: str, value: object) -> GgufHeader:
    """The header with another value for the key, or without the key."""
    metadata = {k: v for k, v in header.metadata.items() if k != key}
    return replace(header, metadata=metadata if value is None else {**metadata, key: value})


def test_the_shape_is_that_of_the_model(header: GgufHeader) -> None:
    """The shape equals the constants of tests.support.tiny_model."""
    assert gguf_shape(header) == ModelShape(
        context_length=tiny_model.CONTEXT_LENGTH,
        vocabulary_size=tiny_model.VOCABULARY,
        cache_values_per_token=2
        * tiny_model.LAYERS
        * tiny_model.KEY_VALUE_HEADS
        * (tiny_model.HIDDEN // tiny_model.HEADS),
        weights="f16",
    )


@pytest.mark.parametrize("value", [None, [4], "4", 4.0, True, -4, 0])
@pytest.mark.parametrize(
    "key", ["context_length", "block_count", "embedding_length", "attention.head_count"]
)
def test_a_key_that_is_missing_or_no_number(header: GgufHeader, key: str, value: object) -> None:
    """A value of another kind, such as a list's length, is not taken for the number."""
    broken = changed(header, f"llama.{key}", value)
    with pytest.raises(UnknownShapeError, match=f"no number llama.{key}$"):
        gguf_shape(broken)


def test_the_number_of_key_heads_may_be_missing_but_not_a_list(header: GgufHeader) -> None:
    """A missing number equals that of the query heads; a list with a number per layer fails."""
    key = "llama.attention.head_count_kv"
    values = gguf_shape(header).cache_values_per_token
    shared = tiny_model.HEADS // tiny_model.KEY_VALUE_HEADS
    for nothing in (None, 0):
        alike = changed(header, key, nothing)
        assert gguf_shape(alike).cache_values_per_token == values * shared
    with pytest.raises(UnknownShapeError, match=key):
        gguf_shape(changed(header, key, [2, 2]))


@pytest.mark.parametrize("name", [None, 3, "other"])
def test_an_architecture_that_is_missing_or_does_not_match_the_keys(
    header: GgufHeader, name: object
) -> None:
    """Without the architecture that the keys begin with, the shape is unknown."""
    with pytest.raises(UnknownShapeError):
        gguf_shape(changed(header, "general.architecture", name))


@pytest.mark.parametrize("shapes", [{}, {"token_embd.weight": ()}])
def test_embeddings_that_are_missing(
    header: GgufHeader, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Without embeddings, which give the vocabulary's size, the shape is unknown."""
    with pytest.raises(UnknownShapeError, match="token_embd"):
        gguf_shape(replace(header, shapes=shapes))


@pytest.mark.parametrize("kind", [None, 9999, -1, "q4", [1]])
def test_weights_of_an_unknown_kind(header: GgufHeader, kind: object) -> None:
    """An unknown storage format is only a label, and no reason to reject a model."""
    assert gguf_shape(changed(header, "general.file_type", kind)).weights == "gguf"
