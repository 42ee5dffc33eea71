"""GGUF weights are repacked into 8 bits with no more loss than 8 bits have."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from app.llm.engine.openvino.repack import damaged_types, repacked_size, write_repacked
from app.llm.models.gguf_header import read_header
from tests.support.tiny_gguf import make_tiny_gguf

# Rows so long that they are repacked in several pieces, the last one shorter.
ROWS, COLUMNS = 1537, 512


def random_blocks(kind: Type) -> np.ndarray:
    """A matrix of a type, in bytes: any steps, and scales and offsets of any size."""
    random = np.random.default_rng(7)
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (ROWS * COLUMNS // weights, size), np.uint8)
    floats = random.normal(size=(len(blocks), 2)) * 10.0 ** random.integers(-7, 2, (len(blocks), 1))
    floats[:3] = [(0, 0), (0, 1), (1, 0)]
    blocks[:, :4] = floats.astype("<f2").view(np.uint8)
    return blocks.reshape(ROWS, -1)


def repacked(path: Path) -> Path:
    """A copy of a GGUF file, repacked."""
    copy, header = path.with_name("copy.gguf"), read_header(path)
    with copy.open("wb") as file:
        write_repacked(path, header, file)
    assert copy.stat().st_size == repacked_size(header)
    return copy


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q4_K])
def test_a_damaged_type_becomes_8_bits(tmp_path: Path, kind: Type) -> None:
    """No weight moves by more than half a step of 127 to its block's largest weight."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("first", random_blocks(kind), raw_dtype=kind)
    writer.add_tensor("vector", np.arange(7, dtype=np.float32))
    writer.add_tensor("second", random_blocks(kind)[::-1].copy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert damaged_types(read_header(path)) == [kind.name]
    copy = repacked(path)
    assert damaged_types(read_header(copy)) == []
    for old, new in zip(gguf.GGUFReader(path).tensors, gguf.GGUFReader(copy).tensors, strict=True):
        assert (new.name, list(new.shape)) == (old.name, list(old.shape))
        if old.name == "vector":
            assert np.array_equal(new.data, old.data)
            continue
        assert new.tensor_type == Type.Q8_0
        before = gguf.dequantize(old.data, kind).reshape(-1, 32)
        after = gguf.dequantize(new.data, Type.Q8_0).reshape(-1, 32)
        # A block's ends are taken for its largest weight, and the smallest 16-bit float is 6e-8.
        scale, least = gguf.dequantize(old.data, kind), 127 * 6e-8
        assert scale.shape == (ROWS, COLUMNS)
        bound = _ends(old.data, kind) / 127 * (0.5 + 127 / 2048) + least
        assert (np.abs(after - before) <= bound).all()


def _ends(data: np.ndarray, kind: Type) -> np.ndarray:
    """The largest absolute weight that each block of 32 could have, a row each."""
    blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]).copy()
    head = 4 if kind == Type.Q4_1 else 16
    ends = []
    for steps in (0, 255):
        blocks[:, head:] = steps
        ends.append(np.abs(gguf.dequantize(blocks, kind)).reshape(-1, 32).max(1, keepdims=True))
    return np.asarray(np.maximum(*ends))


@pytest.mark.parametrize("kind", [None, Type.Q4_0, Type.Q8_0])
def test_other_types_are_copied(tmp_path: Path, kind: Type | None) -> None:
    """A file without damaged types is copied byte for byte."""
    path = make_tiny_gguf(tmp_path / "tiny.gguf", packed=kind)
    assert damaged_types(read_header(path)) == []
    assert repacked(path).read_bytes() == path.read_bytes()
