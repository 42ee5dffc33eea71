"""Memory of tensors that need not stay: what was read of a file, and pages of zeros."""

import ctypes
import mmap
from pathlib import Path
from typing import Final

from torch import Tensor

_MAPS: Final = Path("/proc/self/maps")


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor is mapped from a file; false where the system cannot tell."""
    if not _MAPS.exists():
        return False
    for line in _MAPS.read_text().splitlines():
        start, end = (int(number, 16) for number in line.partition(" ")[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return "/" in line
    return False


def forget_pages(tensor: Tensor) -> None:
    """Let go of the memory of a mapped tensor that was only read, or of one full of zeros.

    All that was read of a file counts as memory of the process. It is read again where it is
    needed. Memory that is no file's is full of zeros then.
    """
    if not _MAPS.exists():
        return
    size = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // size)
    pages = (tensor.data_ptr() + tensor.nbytes) // size - first
    if pages > 0:
        address, length = ctypes.c_void_p(first * size), ctypes.c_size_t(pages * size)
        ctypes.CDLL(None).madvise(address, length, mmap.MADV_DONTNEED)
