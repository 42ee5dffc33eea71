"""Models from a hub that is unreachable, broken or slow."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from tests.support.fake_hub import FakeHub, Faults
from tests.support.hub_processes import LARGE, PIECE, Downloader, downloader


def test_an_unreachable_hub_with_nothing_cached(hub: FakeHub, child: Downloader) -> None:
    """Without network and cache the error names both, and says what to check."""
    hub.faults = Faults(unreachable=True)
    assert child.download("tiny/nowhere")["error"] == (
        "the hub cannot be reached, and tiny/nowhere is not in the cache: check the network and "
        "HF_ENDPOINT, choose another MODEL__NAME, or set MODEL__SOURCE=bundled"
    )


def test_a_tls_failure_says_so(hub: FakeHub, tmp_path: Path) -> None:
    """Where no TLS connection can be made, the error says TLS and how certificates are named."""
    with downloader(tmp_path / "home", hub.url.replace("http:", "https:")) as process:
        error = process.download("tiny/nowhere")["error"]
    assert re.match(r"the TLS connection to the hub failed \(.+\), and tiny/nowhere is not", error)
    assert "SSL_CERT_FILE" in error


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        (Faults(unreachable=True), "the hub cannot be reached"),
        (Faults(status=503), "the hub answered 503"),
        (Faults(status=429), "the hub answered 429"),
        (Faults(silent=True), "the hub cannot be reached"),
    ],
    ids=["unreachable", "503", "429", "silent"],
)
def test_a_cached_model_is_used_without_the_hub(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path, faults: Faults, reason: str
) -> None:
    """A cached model is used after one request to a hub that does not answer it properly."""
    repo = hub.add("tiny/cached", tiny_model_dir)
    repo.files["pytorch_model.bin"] = b"not downloaded, so not missed"
    repo.branches = ("v1.0",)
    first = child.download("tiny/cached")
    child.download("tiny/cached", revision="v1.0")
    hub.faults = faults
    hub.requests.clear()
    for revision in (None, "v1.0", repo.sha):
        answer = child.download("tiny/cached", revision=revision)
        assert answer["said"][-1] == f"{reason}; using tiny/cached from the cache"
        assert (answer["directory"], answer["revision"]) == (first["directory"], repo.sha)
    assert len(hub.requests) == 3


def test_a_cached_gguf_is_used_without_the_hub(hub: FakeHub, child: Downloader) -> None:
    """A GGUF file that was downloaded is found, and one that was not is an error."""
    hub.add("tiny/offline-ggufs", {"a.gguf": b"GGUFa", "more/b.gguf": b"GGUFb", "c.gguf": b"GGUFc"})
    for name in ("a.gguf", "more/b.gguf"):
        child.download(f"tiny/offline-ggufs/{name}")
    hub.faults = Faults(unreachable=True)
    for name in ("a.gguf", "more/b.gguf"):
        assert child.download(f"tiny/offline-ggufs/{name}")["gguf"] == name
    error = child.download("tiny/offline-ggufs/c.gguf")["error"]
    assert "tiny/offline-ggufs is not whole in the cache" in error


def test_the_hub_may_be_switched_off(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With HF_HUB_OFFLINE, or where nothing listens, the cache is used without a request."""
    hub.add("tiny/off", tiny_model_dir)
    cache = {"HF_HUB_CACHE": str(Path(child.download("tiny/off")["directory"]).parents[2])}
    hub.requests.clear()
    with downloader(tmp_path, hub.url, HF_HUB_OFFLINE="1", **cache) as process:
        said = process.download("tiny/off")["said"]
        assert said[-1] == "HF_HUB_OFFLINE is set; using tiny/off from the cache"
        assert "HF_HUB_OFFLINE is set, and tiny/x is not" in process.download("tiny/x")["error"]
    assert hub.requests == []
    # Progress bars that the environment switches off must not break the download.
    more = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", **cache}
    with downloader(tmp_path, "http://127.0.0.1:9", **more) as process:
        said = process.download("tiny/off")["said"]
        assert said[-1] == "the hub cannot be reached; using tiny/off from the cache"


def test_a_download_of_another_program_is_used(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """A cache without the library's listing of files is used without the hub."""
    hub.add("tiny/other", tiny_model_dir)
    folder = Path(child.download("tiny/other")["directory"])
    shutil.rmtree(folder.parents[1] / "trees")
    hub.faults = Faults(unreachable=True)
    assert child.download("tiny/other")["directory"] == str(folder)


def test_a_cache_that_cannot_be_written(hub: FakeHub, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The error about a cache that cannot be written names its folder."""
    hub.add("tiny/disk", tiny_model_dir)
    cache = tmp_path / "cache"
    cache.write_text("a file where the folder should be")
    with downloader(tmp_path, hub.url, HF_HUB_CACHE=str(cache)) as process:
        error = process.download("tiny/disk")["error"]
    assert error.startswith(f"models cannot be stored in {cache}, since {cache} is no folder")
    assert "HF_HOME" in error


def test_progress_does_not_depend_on_drawn_bars(hub: FakeHub, tmp_path: Path) -> None:
    """Speed and time left are reported with progress bars switched off, and none is drawn."""
    hub.add("tiny/bars", LARGE)
    env = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    with downloader(tmp_path, hub.url, **env) as process:
        said = process.download("tiny/bars")["said"]
        line = r"downloading tiny/bars: \d+ % of \d+ MB, [\d,.]+ MB/s, \d+ s left"
        assert any(re.fullmatch(line, text) for text in said), said
        # Every line of the log is logging's, none is a bar's or blank.
        assert all(re.match(r"[A-Z]+:\S+:", line) for line in process.log.splitlines())


def test_a_broken_hub_with_nothing_cached(hub: FakeHub, child: Downloader) -> None:
    """The error names the hub's status 500, and says what to do."""
    hub.faults = Faults(status=500)
    assert child.download("tiny/broken")["error"] == (
        "the hub answered 500, and tiny/broken is not in the cache: try again later, choose "
        "another MODEL__NAME, or set MODEL__SOURCE=bundled"
    )


def test_a_server_that_is_no_hub(hub: FakeHub, child: Downloader) -> None:
    """A login page in place of the hub gets another error than a broken hub."""
    hub.faults = Faults(body=b"<html>Sign in to the network</html>")
    assert child.download("tiny/page")["error"] == (
        "the server in HF_ENDPOINT does not answer as a hub does: correct HF_ENDPOINT or leave it "
        "out"
    )


def test_a_cut_download_goes_on_where_it_was_cut(hub: FakeHub, child: Downloader) -> None:
    """A connection that breaks twice is resumed after the last whole chunk each time."""
    repo = hub.add("tiny/cut", LARGE)
    hub.faults = Faults(cut_after=[PIECE + 1000, PIECE + 1000])
    answer = child.download("tiny/cut")
    assert hub.ranges("large.gguf") == [None, f"bytes={PIECE}-", f"bytes={2 * PIECE}-"]
    assert (Path(answer["directory"]) / "large.gguf").read_bytes() == repo.files["large.gguf"]


def test_a_broken_download_is_finished_by_the_next_start(hub: FakeHub, child: Downloader) -> None:
    """A failed start keeps every complete file; the next start downloads only the others."""
    repo = hub.add("tiny/again", LARGE)
    hub.faults = Faults(cut_after=[PIECE + 1000], refuse_range=503)
    error = child.download("tiny/again")["error"]
    assert error.startswith("the hub answered 503 for tiny/again: try again later")
    hub.faults = Faults(unreachable=True)
    assert "is not whole in the cache" in child.download("tiny/again", revision=repo.sha)["error"]
    hub.faults = Faults()
    hub.requests.clear()
    answer = child.download("tiny/again")
    assert hub.downloads("tiny/again") == ["large.gguf"]
    assert (Path(answer["directory"]) / "large.gguf").read_bytes() == repo.files["large.gguf"]


def test_partial_files_of_killed_downloads_are_removed(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """An old partial file is deleted; a recent one, which may be in use, is kept."""
    hub.add("tiny/left", tiny_model_dir)
    blobs = Path(child.download("tiny/left")["directory"]).parents[1] / "blobs"
    old, new = blobs / "old.1234.incomplete", blobs / "new.1234.incomplete"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    child.download("tiny/left")
    assert (old.exists(), new.exists()) == (False, True)
