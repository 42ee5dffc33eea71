"""A GGUF file for OpenVINO, which opens it for reading and writing though it only reads.

A file of another user, or on a read-only volume, cannot be opened so. The library then gets a copy
that has no name, which the kernel removes however this process ends.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile, gettempdir
from typing import IO

from app.core.machine import available_memory
from app.llm.models.snapshot import Progress

# Loading took twice the file's size when this was measured, and a copy takes it once more.
_MEMORY_FACTOR = 4


@contextmanager
def writable(path: Path, progress: Progress) -> Iterator[str]:
    """The path under which OpenVINO can open a GGUF file inside the block, and only there.

    ``progress`` is called with a line if that is a copy: in memory where that has room for four
    times the file, because the weights are loaded beside it, else in the temporary folder.

    Raises:
        OSError: There is no room for a copy, or no temporary folder.
    """
    if os.access(path, os.W_OK) or sys.platform != "linux":
        yield str(path)
        return
    size = path.stat().st_size
    with TemporaryDirectory() as folder, _empty_file(size, path.name) as (copy, where):
        progress(
            f"{path} cannot be written: OpenVINO loads a copy in {where} ({size / 1e6:.0f} MB)"
        )
        with path.open("rb") as file:
            shutil.copyfileobj(file, copy, 1 << 20)
        copy.flush()
        # The library knows the format by the name's ending, which a descriptor has not.
        link = Path(folder, "model.gguf")
        link.symlink_to(f"/proc/self/fd/{copy.fileno()}")
        yield str(link)


@contextmanager
def _empty_file(size: int, name: str) -> Iterator[tuple[IO[bytes], str]]:
    """A nameless file with room for ``size`` bytes, and where it is."""
    folder = gettempdir()
    if available_memory() >= _MEMORY_FACTOR * size:
        with os.fdopen(os.memfd_create(name[:99]), "wb") as file:
            yield file, "memory"
    elif shutil.disk_usage(folder).free > size:
        with TemporaryFile() as file:
            yield file, folder
    else:
        raise OSError(
            f"it opens the file for writing, which is not permitted, and {folder} has no room for "
            f"a copy of {size / 1e6:.0f} MB"
        )
