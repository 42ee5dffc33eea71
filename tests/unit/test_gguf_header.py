"""Reading the header of a GGUF file: right, and never further than the file goes."""

import contextlib
from pathlib import Path

import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from app.llm.gguf_header import read_header
from tests.support.tiny_gguf import make_tiny_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole file."""
    return make_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_it_says_what_the_reference_reader_says(path: Path) -> None:
    """Every key and every tensor of the library that writes these files."""
    header = read_header(path)
    reference = GGUFReader(path)
    values = {k: f.contents() for k, f in reference.fields.items() if not k.startswith("GGUF.")}
    assert {
        key: len(value) if isinstance(value, list) else value for key, value in values.items()
    } == pytest.approx(dict(header.metadata))
    assert {t.name: tuple(map(int, reversed(t.shape))) for t in reference.tensors} == header.shapes
    assert header.end == max(t.data_offset + t.n_bytes for t in reference.tensors)


def test_a_file_that_is_cut_off_is_told(path: Path, tmp_path: Path) -> None:
    """Wherever it is cut."""
    whole = path.read_bytes()
    end = read_header(path).end
    cut = tmp_path / "cut.gguf"
    for size in [*range(1, 20_000, 997), end // 2, end - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^it"):
            read_header(cut)


@given(st.binary(min_size=1, max_size=300))
def test_any_bytes_are_an_error_of_one_kind(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    """Also behind the right first bytes, with counts and lengths beyond all bounds."""
    file = tmp_path_factory.getbasetemp() / "any.gguf"
    for content in (data, b"GGUF\x03\0\0\0" + data):
        file.write_bytes(content)
        with contextlib.suppress(ValueError):
            read_header(file)
