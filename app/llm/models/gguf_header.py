"""Reads the header of a GGUF file: the metadata, the tensors' shapes and the size of the file.

The engine needs a few numbers before it loads the weights. The libraries that read GGUF take
seconds (``gguf``) or import torch (transformers). The format is specified in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import hashlib
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

MAGIC: Final = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# The specification's numbers of the fixed-size types, and struct's letters for them.
_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_DEFAULT_ALIGNMENT = 32
# Far above what models have, 300,000 tokens in a vocabulary; GGML's tensors have four dimensions.
_MAX_COUNT, _MAX_STRING, _MAX_DIMENSIONS = 2**24, 2**24, 4


@dataclass(frozen=True)
class GgufTensor:
    """The data of a tensor: its type, its size in bytes, and its offset behind the header.

    ``entry`` is the header's position of the type (4 bytes) and the offset (8 bytes).
    """

    kind: int
    size: int
    offset: int
    entry: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    A tensor's shape has the slowest dimension first; ``end`` is the size of a whole file in bytes.
    The tensors' data begin at ``data`` and at multiples of ``alignment`` behind it.
    ``tokenizer_digest`` is that of all that the file says of its tokenizer.
    """

    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    end: int
    data: int = 0
    alignment: int = _DEFAULT_ALIGNMENT
    tensors: Mapping[str, GgufTensor] = field(default_factory=dict)
    tokenizer_digest: str = ""


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file.

    Raises:
        ValueError: The file is not a GGUF file, or is truncated.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            header = _Reader(data).header()
        except ValueError:
            raise
        except Exception as error:  # noqa: BLE001 - garbage raises anything
            raise ValueError(f"its header cannot be read: {error!r}") from None
        if header.end > len(data):
            raise ValueError(f"it ends {header.end - len(data)} bytes early")
    return header


class _Reader:
    """A position in the file that moves on with every value read."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> GgufHeader:
        # Importing gguf and numpy takes longer than reading a header.
        import gguf

        if self._data[:4] != MAGIC:
            raise ValueError("it is not a GGUF file")
        self._at = 4
        version, tensors, keys = self._numbers("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}, and those that can be read are 2 and 3")
        metadata: dict[str, Any] = {}
        digest = hashlib.sha256()
        for _ in range(self._count(keys)):
            begin = self._at
            key = self._string()
            metadata[key] = self._value(self._numbers("I")[0])
            if key.startswith("tokenizer."):
                digest.update(self._data[begin : self._at])
        shapes: dict[str, tuple[int, ...]] = {}
        placed: dict[str, GgufTensor] = {}
        for _ in range(self._count(tensors)):
            name = self._string()
            rank = self._count(self._numbers("I")[0], _MAX_DIMENSIONS)
            dimensions = self._numbers(f"{rank}Q")
            entry = self._at
            kind, offset = self._numbers("IQ")
            shapes[name] = tuple(reversed(dimensions))
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
            placed[name] = GgufTensor(kind, math.prod(dimensions) // block * size, offset, entry)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        start = -(-self._at // alignment) * alignment
        end = start + max((tensor.offset + tensor.size for tensor in placed.values()), default=0)
        return GgufHeader(metadata, shapes, end, start, alignment, placed, digest.hexdigest())

    def _numbers(self, letters: str) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{letters}")
        values = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return values

    def _count(self, count: int, most: int = _MAX_COUNT) -> int:
        """A count of the file, which is not believed before it is compared."""
        if count > most:
            raise ValueError(f"its header counts {count} elements, and at most {most} are read")
        return count

    def _string(self) -> str:
        length = self._count(self._numbers("Q")[0], _MAX_STRING)
        self._skip(length)
        return self._data[self._at - length : self._at].decode()

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._data):
            raise ValueError("it ends within its header")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._numbers(_SCALARS[kind])[0]
        element, count = self._numbers("IQ")
        self._count(count)
        if letter := _SCALARS.get(element):
            at = self._at
            self._skip(struct.calcsize(f"<{letter}") * count)
            return list(struct.unpack_from(f"<{count}{letter}", self._data, at))
        return [self._value(element) for _ in range(count)]
