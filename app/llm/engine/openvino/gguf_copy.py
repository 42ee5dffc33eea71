"""A copy of a GGUF file where OpenVINO cannot load the file itself, or would damage its weights.

The library opens a file for writing though it only reads, which fails with a file of another user
or on a read-only volume; and it rounds weights of some types (``repack``). It then gets a copy that
has no name, which the kernel removes however this process ends.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO

from app.core.machine import available_memory
from app.llm.engine.openvino.repack import damaged_types, repacked_size, write_repacked
from app.llm.models.gguf_header import GgufHeader
from app.llm.models.progress import Progress

# Loading took twice the file's size when this was measured, and a copy takes it once more.
_MEMORY_FACTOR = 4


@contextmanager
def loadable(path: Path, header: GgufHeader, progress: Progress) -> Iterator[str]:
    """The path under which OpenVINO can load a GGUF file inside the block, and only there.

    ``progress`` is called with a line if that is a copy: in memory where that has room for four
    times its size, because the weights are loaded beside it, else in the temporary folder.

    Raises:
        OSError: There is no room for a copy, or no temporary folder.
    """
    damaged = damaged_types(header)
    is_copied = damaged or not (os.access(path, os.W_OK) or sys.platform != "linux")
    if not is_copied and path.suffix == ".gguf":
        yield str(path)
        return
    why = (
        f"would have its {' and '.join(damaged)} weights rounded"
        if damaged
        else "cannot be written"
    )
    size = repacked_size(header)
    with TemporaryDirectory() as folder:
        # The library knows the format by the name's ending, in lower case; a descriptor has none.
        link = Path(folder, "model.gguf")
        if not is_copied:
            link.symlink_to(path.absolute())
            yield str(link)
            return
        with _empty_file(size, link, why) as (copy, where):
            progress(f"{path} {why}: OpenVINO loads a copy in {where} ({size / 1e6:.0f} MB)")
            write_repacked(path, header, copy, progress)
            copy.flush()
            progress("loading the copy with OpenVINO")
            yield str(link)


@contextmanager
def _empty_file(size: int, link: Path, why: str) -> Iterator[tuple[IO[bytes], str]]:
    """A file with room for ``size`` bytes that ``link`` leads to, and where it is."""
    folder = str(link.parent.parent)
    if sys.platform == "linux" and available_memory() >= _MEMORY_FACTOR * size:
        with os.fdopen(os.memfd_create("model.gguf"), "wb") as file:
            link.symlink_to(f"/proc/self/fd/{file.fileno()}")
            yield file, "memory"
    elif shutil.disk_usage(folder).free <= size:
        raise OSError(f"it {why}, and {folder} has no room for a copy of {size / 1e6:.0f} MB")
    elif sys.platform == "linux":
        with TemporaryFile(dir=folder) as file:
            link.symlink_to(f"/proc/self/fd/{file.fileno()}")
            yield file, folder
    else:
        with link.open("wb") as file:
            yield file, folder
