"""Memory that takes pages only while it holds values: new memory, and what was read of a file."""

import ctypes
import mmap
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MAPS: Final = Path("/proc/self/maps")


def private_memory(size: int) -> mmap.mmap:
    """Memory full of zeros, whose pages exist once they are written."""
    # Shared memory, the default, would not be given back.
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)


class UnwrittenZeros(TorchFunctionMode):
    """A context in which ``torch.zeros`` of bytes does not write them.

    transformers makes the whole KV cache of zeros, of which most may never be used.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        if func is torch.zeros and kwargs.get("dtype") is torch.uint8:
            return torch.frombuffer(private_memory(*args), dtype=torch.uint8)
        return func(*args, **kwargs)


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
    """Let go of the memory of a mapped tensor that was only read.

    All that was read of a file counts as memory of the process. It is read again where it is
    needed.
    """
    if not _MAPS.exists():
        return
    size = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // size)
    pages = (tensor.data_ptr() + tensor.nbytes) // size - first
    if pages > 0:
        address, length = ctypes.c_void_p(first * size), ctypes.c_size_t(pages * size)
        ctypes.CDLL(None).madvise(address, length, mmap.MADV_DONTNEED)
