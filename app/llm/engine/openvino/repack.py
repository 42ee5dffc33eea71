"""Repacks GGUF weights that OpenVINO's reader would damage into 8 bits.

Q4_1 and Q4_K blocks have a 4-bit step and a float offset. The reader keeps the offset as a whole
number of steps between 0 and 15: of a Q4_1 file of SmolLM2-135M that changes the weights by 9 % on
average, and answers begin with other words. It holds Q4_0, Q6_K, Q8_0 and F16 without a change, and
refuses all others. Q8_0 blocks, of 8 bits and a scale, change Q4_1 weights by 0.6 %.
"""

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from app.llm.models.gguf_header import GgufHeader, GgufTensor
from app.llm.models.progress import Progress, counted

# A Q8_0 block: 32 weights and a 16-bit scale.
_WEIGHTS, _BYTES = 32, 34
# Bytes that are repacked at once: few enough for a processor's cache.
_PIECE = 1 << 18


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    """Q4_1: a scale, an offset, and 16 bytes whose lower halves are the first 16 weights."""
    scale, offset = (blocks[:, at : at + 2].view("<f2").astype(np.float32) for at in (0, 2))
    return _q8_0(np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1), scale, offset)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """Q4_K: a scale of 8 scales, one of 8 offsets, 12 bytes with both, and 8 times 32 weights."""
    scale, offset = (blocks[:, at : at + 2].view("<f2").astype(np.float32) for at in (0, 2))
    scales, offsets = gguf.quants.Q4_K.get_scale_min(blocks[:, 4:16])
    pairs = blocks[:, 16:].reshape(-1, 4, 1, 32)
    steps = np.concatenate([pairs & 15, pairs >> 4], axis=2)
    return _q8_0(
        steps.reshape(-1, _WEIGHTS),
        (scale * scales).reshape(-1, 1),
        (-offset * offsets).reshape(-1, 1),
    )


def _q8_0(steps: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Q8_0 blocks, a row each, for rows of 32 weights ``steps * scale + offset``.

    ``steps`` are 0 to 15, so a row's scale is found from its ends, without a look at its weights.
    """
    largest = np.maximum(np.abs(offset), np.abs(offset + 15 * scale))
    stored = (largest / 127).astype("<f2")
    inverse = stored.astype(np.float32)
    np.divide(1, inverse, out=inverse, where=inverse != 0)
    weights = steps * (scale * inverse)
    weights += offset * inverse
    np.rint(weights, out=weights)
    # The scale has been rounded, and a very small one by much.
    np.clip(weights, -127, 127, out=weights)
    packed = np.empty((len(steps), _BYTES), np.uint8)
    packed[:, :2] = stored.view(np.uint8)
    packed[:, 2:].view(np.int8)[...] = weights
    return packed


_REPACKED: Final[dict[int, Callable[[np.ndarray], np.ndarray]]] = {
    Type.Q4_1: _q4_1,
    Type.Q4_K: _q4_k,
}


def damaged_types(header: GgufHeader) -> list[str]:
    """Names of the types in a GGUF file whose weights OpenVINO's reader would change."""
    return sorted({Type(t.kind).name for t in header.tensors.values() if t.kind in _REPACKED})


def repacked_size(header: GgufHeader) -> int:
    """Size in bytes of the file that :func:`write_repacked` writes."""
    return header.data + sum(_aligned(_new_size(t), header) for t in header.tensors.values())


def write_repacked(
    path: Path, header: GgufHeader, file: IO[bytes], progress: Progress = lambda *_: None
) -> None:
    """Write a GGUF file without damaged types; all else in it is the same.

    A type and an offset have a fixed width in the header, so only they change there.
    """
    with path.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as data:
        new = bytearray(data[: header.data])
        offset = 0
        for tensor in header.tensors.values():
            kind = Type.Q8_0 if tensor.kind in _REPACKED else tensor.kind
            place = int(kind).to_bytes(4, "little") + offset.to_bytes(8, "little")
            new[tensor.entry : tensor.entry + len(place)] = place
            offset += _aligned(_new_size(tensor), header)
        file.write(new)
        what = "copying the weights for OpenVINO"
        for tensor in counted(header.tensors.values(), what, progress):
            for piece in _pieces(data, header.data + tensor.offset, tensor):
                file.write(piece)
            size = _new_size(tensor)
            file.write(bytes(_aligned(size, header) - size))


def _pieces(data: mmap.mmap, start: int, tensor: GgufTensor) -> Iterator[bytes | memoryview]:
    repack = _REPACKED.get(tensor.kind)
    block = gguf.GGML_QUANT_SIZES[Type(tensor.kind)][1]
    piece = _PIECE // block * block
    for at in range(0, tensor.size, piece):
        raw = data[start + at : start + min(at + piece, tensor.size)]
        yield repack(np.frombuffer(raw, np.uint8).reshape(-1, block)).data if repack else raw


def _new_size(tensor: GgufTensor) -> int:
    if tensor.kind not in _REPACKED:
        return tensor.size
    weights, size = gguf.GGML_QUANT_SIZES[Type(tensor.kind)]
    return tensor.size // int(size) * int(weights) // _WEIGHTS * _BYTES


def _aligned(size: int, header: GgufHeader) -> int:
    return -(-size // header.alignment) * header.alignment
