"""Models from the hub: the real library, in processes of their own, against a hub of our own.

huggingface_hub reads its environment when it is imported, so the code under test runs in a child
whose environment names the fake hub and an empty cache.
"""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from app.core.config import PROJECT_ROOT, ModelSettings
from app.llm.engine.base import (
    HEADER_BYTES,
    Configure,
    GenerationRequest,
    LoadFailed,
    Loading,
    Ready,
    Report,
    SamplingParams,
    Step,
    Stop,
    Submit,
    body_length,
    pack,
    unpack_report,
)
from app.main import EXIT_STARTUP_FAILED
from tests.support.fake_hub import FakeHub, Faults, running_hub

GOOD_TOKEN = "hf_canaryGoodTokenThatNoLogMayShow"
OTHER_TOKEN = "hf_canaryOtherTokenThatNoLogMayShow"
UNKNOWN_TOKEN = "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"
DEFAULT_MODEL = "google/gemma-2-2b-it"

# What the library writes at once; less than that is lost when a connection breaks.
PIECE = constants.DOWNLOAD_CHUNK_SIZE
LARGE = {"config.json": b"{}", "large.gguf": random.Random(0).randbytes(2 * PIECE + 5000)}

# Reads calls of app.llm.hub.download from standard input, one a line, and answers each.
CHILD = """
import json, logging, sys
logging.basicConfig(level=logging.DEBUG)
from app.llm import hub
from app.utils.errors import ModelLoadError
hub._PROGRESS_SECONDS = 0
for line in sys.stdin:
    said = []
    try:
        found = hub.download(**json.loads(line), progress=said.append)
        answer = {"directory": str(found.directory), "gguf": found.gguf, "revision": found.revision}
    except ModelLoadError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer | {"said": said}), flush=True)
"""


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """This process's environment, with another hub and another cache."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING", "MODEL__", "SECURITY__", "TRANSFORMERS_"))
    }
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_ETAG_TIMEOUT": "1"}
    local = "127.0.0.1,localhost"
    direct = {"NO_PROXY": local, "no_proxy": local, "HF_HUB_DISABLE_XET": "1"}
    return kept | hub | direct | more


class Downloader:
    """A process that runs ``app.llm.hub.download`` when told to."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def log(self) -> str:
        """All that the process has logged, at level DEBUG."""
        return self._log.read_text()

    def download(
        self, name: str, *, revision: str | None = None, token: str | None = None
    ) -> dict[str, Any]:
        """One call; the snapshot, or the error's one line, and what the progress said."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        call = {"name": name, "revision": revision, "token": token}
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "\n" not in answer.get("error", "")
        for secret in (GOOD_TOKEN, OTHER_TOKEN, UNKNOWN_TOKEN):
            assert secret not in json.dumps(answer)
        return answer


@contextmanager
def downloader(home: Path, endpoint: str, **env: str) -> Iterator[Downloader]:
    """A :class:`Downloader` with its cache under ``home``."""
    home.mkdir(parents=True, exist_ok=True)
    path = home / "log.txt"
    with (
        path.open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=PROJECT_ROOT,
            env=environment(endpoint, home, **env),
        ) as process,
    ):
        # Leaving the block closes standard input, which ends the child.
        yield Downloader(process, path)


@pytest.fixture(scope="module")
def one_hub() -> Iterator[FakeHub]:
    """The hub that this module's tests share."""
    with running_hub() as server:
        yield server


@pytest.fixture
def hub(one_hub: FakeHub) -> FakeHub:
    """The hub as if freshly started."""
    one_hub.repos.clear()
    one_hub.requests.clear()
    one_hub.faults = Faults()
    one_hub.tokens = {GOOD_TOKEN: {"tiny/gated", DEFAULT_MODEL}, OTHER_TOKEN: set()}
    return one_hub


@pytest.fixture(scope="module")
def child(one_hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Downloader]:
    """One downloader for all tests; each test has repositories of its own names."""
    with downloader(tmp_path_factory.mktemp("hub") / "home", one_hub.url) as process:
        yield process


# --- What is downloaded ---------------------------------------------------------------------------


def test_a_model_is_downloaded_whole(hub: FakeHub, child: Downloader, tiny_model_dir: Path) -> None:
    """A download brings the same bytes, tells the commit, and says how far it is."""
    repo = hub.add("tiny/whole", tiny_model_dir)
    answer = child.download("tiny/whole")
    assert (answer["gguf"], answer["revision"]) == (None, repo.sha)
    for name, content in repo.files.items():
        assert (Path(answer["directory"]) / name).read_bytes() == content
    assert answer["said"][:2] == [
        "looking up tiny/whole on the hub",
        "downloading tiny/whole (6 files)",
    ]
    assert any(re.fullmatch(r"downloading tiny/whole: \d+ % of \d+ MB", s) for s in answer["said"])


def test_only_what_is_needed_is_downloaded(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """Pickles, code, pictures, subfolders and weights in a second layout are left out."""
    repo = hub.add("tiny/much", tiny_model_dir)
    needed = set(repo.files)
    for name in (
        "pytorch_model.bin",
        "training.pt",
        "modeling_tiny.py",
        "README.md",
        "picture.png",
        "consolidated.safetensors",
        "onnx/model.safetensors",
        "onnx/config.json",
    ):
        repo.files[name] = b"not wanted"
    answer = child.download("tiny/much")
    assert set(hub.downloads("tiny/much")) == needed
    folder = Path(answer["directory"])
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*")} == needed


def test_a_second_download_asks_for_no_contents(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """What is in the cache at the hub's commit is not downloaded again."""
    hub.add("tiny/twice", tiny_model_dir)
    first = child.download("tiny/twice")
    hub.requests.clear()
    assert child.download("tiny/twice")["directory"] == first["directory"]
    assert hub.downloads("tiny/twice") == []


def test_a_branch_is_recorded_as_its_commit(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """A branch, a tag and a commit all lead to the commit that is reported."""
    repo = hub.add("tiny/branches", tiny_model_dir)
    repo.branches = ("v1.0", "refs/pr/1")
    for revision in ("main", "v1.0", "refs/pr/1", repo.sha):
        assert child.download("tiny/branches", revision=revision)["revision"] == repo.sha


def test_a_pinned_commit_stays_pinned(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """A push to the branch gives a new commit and new contents, never a mixture."""
    repo = hub.add("tiny/pushed", tiny_model_dir)
    old = child.download("tiny/pushed")
    repo.files["config.json"] += b"\n"
    new = child.download("tiny/pushed")
    assert old["revision"] != new["revision"] == repo.sha
    assert (Path(new["directory"]) / "config.json").read_bytes() == repo.files["config.json"]
    assert (Path(old["directory"]) / "config.json").read_bytes() != repo.files["config.json"]


def test_an_unknown_revision_is_one_line(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """A revision that does not exist is named, with what to do."""
    hub.add("tiny/revision", tiny_model_dir)
    assert child.download("tiny/revision", revision="v9")["error"] == (
        "tiny/revision has no revision 'v9': correct MODEL__REVISION or leave it out"
    )


def test_the_only_gguf_is_chosen(hub: FakeHub, child: Downloader) -> None:
    """A repository with one GGUF file and no safetensors is served from it."""
    hub.add("tiny/gguf", {"tiny.gguf": b"GGUF...", "README.md": b"-", "config.json": b"{}"})
    answer = child.download("tiny/gguf")
    assert answer["gguf"] == "tiny.gguf"
    assert set(hub.downloads("tiny/gguf")) == {"tiny.gguf", "config.json"}


def test_one_of_several_gguf_files_is_named(hub: FakeHub, child: Downloader) -> None:
    """Several GGUF files are refused with the exact setting that picks one, and it does."""
    files = {"b.Q8_0.gguf": b"GGUF8", "a.Q4_0.gguf": b"GGUF4", "more/c.gguf": b"GGUFc"}
    hub.add("tiny/ggufs", files)
    error = child.download("tiny/ggufs")["error"]
    assert error == (
        "tiny/ggufs has several GGUF files: name one of them, as in "
        "MODEL__NAME=tiny/ggufs/a.Q4_0.gguf"
    )
    assert child.download("tiny/ggufs/a.Q4_0.gguf")["gguf"] == "a.Q4_0.gguf"
    assert child.download("tiny/ggufs/more/c.gguf")["gguf"] == "more/c.gguf"
    assert hub.downloads("tiny/ggufs") == ["a.Q4_0.gguf", "more/c.gguf"]
    assert child.download("tiny/ggufs/d.gguf")["error"] == (
        "tiny/ggufs has no file d.gguf: correct MODEL__NAME; "
        "it has a.Q4_0.gguf, b.Q8_0.gguf, more/c.gguf"
    )


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_unread(hub: FakeHub, child: Downloader, pickle: str) -> None:
    """A repository with pickled weights alone is refused before a byte of it is asked for."""
    hub.add("tiny/pickle", {"config.json": b"{}", pickle: b"\x80\x04", "x/model.safetensors": b""})
    error = child.download("tiny/pickle")["error"]
    assert error.startswith("tiny/pickle has only pickled weights")
    assert "choose a model with safetensors or GGUF weights" in error
    assert hub.downloads("tiny/pickle") == []


def test_a_repository_without_weights_is_refused(hub: FakeHub, child: Downloader) -> None:
    """A repository that holds no model is said to hold none."""
    hub.add("tiny/empty", {"README.md": b"-"})
    assert child.download("tiny/empty")["error"].startswith("tiny/empty has no weights: choose")


# --- Who may download -----------------------------------------------------------------------------


def test_a_gated_model_without_a_token(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """The line names all four ways out: licence, token, another model, the bundled one."""
    hub.add("tiny/gated", tiny_model_dir, gated=True)
    error = child.download("tiny/gated")["error"]
    assert error == (
        "tiny/gated is a gated model; accept its licence on the hub and set HUGGINGFACE_TOKEN, "
        "choose another MODEL__NAME, or set MODEL__SOURCE=bundled"
    )
    assert all(request.authorization is None for request in hub.requests)


def test_a_gated_model_with_a_token_that_was_not_granted(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """A valid token of an account that did not accept the licence is told to do so."""
    hub.add("tiny/gated", tiny_model_dir, gated=True)
    error = child.download("tiny/gated", token=OTHER_TOKEN)["error"]
    assert error.startswith("tiny/gated is a gated model; the token in HUGGINGFACE_TOKEN may not")
    assert "accept its licence" in error
    assert "MODEL__SOURCE=bundled" in error


@pytest.mark.parametrize("gated", [True, False])
def test_a_token_the_hub_does_not_know(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path, *, gated: bool
) -> None:
    """A mistyped or revoked token is named as the cause, not the hub's state or the model."""
    hub.add("tiny/gated", tiny_model_dir, gated=gated)
    assert child.download("tiny/gated", token=UNKNOWN_TOKEN)["error"] == (
        "the hub refuses the token in HUGGINGFACE_TOKEN (401): correct it, or leave it out for a "
        "model that is not gated"
    )


def test_a_gated_model_with_a_good_token(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """The token opens the model, is sent to the hub alone, and may end in a line break."""
    repo = hub.add("tiny/gated", tiny_model_dir, gated=True)
    answer = child.download("tiny/gated", token=f"{GOOD_TOKEN}\n")
    assert answer["revision"] == repo.sha
    to_hub = {r.authorization for r in hub.requests if r.host == "127.0.0.1"}
    elsewhere = {r.authorization for r in hub.requests if r.host != "127.0.0.1"}
    assert (to_hub, elsewhere) == ({f"Bearer {GOOD_TOKEN}"}, {None})


@pytest.mark.parametrize("token", ["hf_a b", "hf_“quoted”", "hf_a\nhf_b"])
def test_a_token_that_cannot_be_sent(hub: FakeHub, child: Downloader, token: str) -> None:
    """A token that no header can hold is refused without quoting it and without a request."""
    assert child.download("tiny/any", token=token)["error"] == (
        "HUGGINGFACE_TOKEN holds characters that no token has: copy it again from the hub"
    )
    assert hub.requests == []


def test_a_private_model_does_not_exist_without_its_token(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """A private repository looks missing, and the line says that a token may be lacking."""
    hub.add("tiny/private", tiny_model_dir, private=True)
    error = child.download("tiny/private")["error"]
    assert error.startswith("tiny/private is not on the hub, or is private: check MODEL__NAME")
    assert "HUGGINGFACE_TOKEN" in error


@pytest.mark.parametrize("token", [None, OTHER_TOKEN])
def test_a_model_that_does_not_exist(hub: FakeHub, child: Downloader, token: str | None) -> None:
    """A misspelt name gets the same line whether the hub answers 401 or 404."""
    error = child.download("tiny/missing", token=token)["error"]
    assert error == (
        "tiny/missing is not on the hub, or is private: check MODEL__NAME, set HUGGINGFACE_TOKEN "
        "if it is private, or set MODEL__SOURCE=local for a path"
    )


@pytest.mark.parametrize(
    "name", ["a/b/c", "/srv/models/x", "/srv/models/x.gguf", "../x", "a b/c", "a/../b", "ü/x", "."]
)
def test_a_name_that_is_none(hub: FakeHub, child: Downloader, name: str) -> None:
    """What cannot be a repository's name is refused without asking the hub."""
    error = child.download(name)["error"]
    assert error.endswith(
        " is not a hub repository name (owner/name): correct MODEL__NAME; "
        "for a path set MODEL__SOURCE=local"
    )
    assert hub.requests == []


def test_no_token_is_ever_logged(child: Downloader) -> None:
    """After all of the above, at level DEBUG, no token is in the log of the process."""
    for secret in (GOOD_TOKEN, OTHER_TOKEN, UNKNOWN_TOKEN):
        assert secret not in child.log


# --- When the hub is not well ---------------------------------------------------------------------


def test_an_unreachable_hub_with_nothing_cached(hub: FakeHub, child: Downloader) -> None:
    """Without network and cache the line says both, and what to check."""
    hub.faults = Faults(unreachable=True)
    assert child.download("tiny/nowhere")["error"] == (
        "the hub cannot be reached, and tiny/nowhere is not in the cache: check the network and "
        "HF_ENDPOINT, choose another MODEL__NAME, or set MODEL__SOURCE=bundled"
    )


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
def test_a_cached_model_is_used_when_the_hub_is_away(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path, faults: Faults, reason: str
) -> None:
    """A model downloaded once, from a branch or not, starts without the hub within seconds."""
    repo = hub.add("tiny/cached", tiny_model_dir)
    repo.files["pytorch_model.bin"] = b"not downloaded, so not missed"
    repo.branches = ("v1.0",)
    first = child.download("tiny/cached")
    child.download("tiny/cached", revision="v1.0")
    hub.faults = faults
    began = time.monotonic()
    for revision in (None, "v1.0", repo.sha):
        answer = child.download("tiny/cached", revision=revision)
        assert answer["said"][-1] == f"{reason}; using tiny/cached from the cache"
        assert (answer["directory"], answer["revision"]) == (first["directory"], repo.sha)
    assert time.monotonic() - began < 10


def test_a_cached_gguf_is_used_when_the_hub_is_away(hub: FakeHub, child: Downloader) -> None:
    """The GGUF file that was downloaded is found again, and one that was not is missed."""
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
    with downloader(tmp_path, hub.url) as process:
        process.download("tiny/off")
    hub.requests.clear()
    with downloader(tmp_path, hub.url, HF_HUB_OFFLINE="1") as process:
        said = process.download("tiny/off")["said"]
        assert said[-1] == "HF_HUB_OFFLINE is set; using tiny/off from the cache"
        assert "HF_HUB_OFFLINE is set, and tiny/x is not" in process.download("tiny/x")["error"]
    assert hub.requests == []
    # A bar that the environment switches off must not break the download.
    with downloader(tmp_path, "http://127.0.0.1:9", HF_HUB_DISABLE_PROGRESS_BARS="1") as process:
        said = process.download("tiny/off")["said"]
        assert said[-1] == "the hub cannot be reached; using tiny/off from the cache"


def test_what_another_program_downloaded_is_used(
    hub: FakeHub, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A cache without the listing that our library's version writes serves without the hub."""
    hub.add("tiny/other", tiny_model_dir)
    with downloader(tmp_path, hub.url) as process:
        folder = Path(process.download("tiny/other")["directory"])
    shutil.rmtree(folder.parents[1] / "trees")
    hub.faults = Faults(unreachable=True)
    with downloader(tmp_path, hub.url) as process:
        assert process.download("tiny/other")["directory"] == str(folder)


def test_a_cache_that_cannot_be_written(hub: FakeHub, tiny_model_dir: Path, tmp_path: Path) -> None:
    """A full or misplaced disk is named, with the folder."""
    hub.add("tiny/disk", tiny_model_dir)
    cache = tmp_path / "cache"
    cache.write_text("a file where the folder should be")
    with downloader(tmp_path, hub.url, HF_HUB_CACHE=str(cache)) as process:
        error = process.download("tiny/disk")["error"]
    assert error.startswith(f"tiny/disk cannot be downloaded to {cache}: ")
    assert "HF_HOME" in error


def test_progress_does_not_depend_on_drawn_bars(
    hub: FakeHub, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Progress is told with drawn bars switched off, and nothing is drawn to standard error."""
    hub.add("tiny/bars", tiny_model_dir)
    env = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    with downloader(tmp_path, hub.url, **env) as process:
        said = process.download("tiny/bars")["said"]
        assert any("% of" in line for line in said)
        # Every line of the log is logging's, none is a bar's or blank.
        assert all(re.match(r"[A-Z]+:\S+:", line) for line in process.log.splitlines())


def test_a_broken_hub_with_nothing_cached(hub: FakeHub, child: Downloader) -> None:
    """A 500 is named as the hub's answer, with what to do."""
    hub.faults = Faults(status=500)
    assert child.download("tiny/broken")["error"] == (
        "the hub answered 500, and tiny/broken is not in the cache: try again later, choose "
        "another MODEL__NAME, or set MODEL__SOURCE=bundled"
    )


def test_a_server_that_is_no_hub(hub: FakeHub, child: Downloader) -> None:
    """A login page in place of the hub is told apart from a broken hub."""
    hub.faults = Faults(body=b"<html>Sign in to the network</html>")
    assert child.download("tiny/page")["error"] == (
        "the server in HF_ENDPOINT does not answer as a hub does: correct HF_ENDPOINT or leave it "
        "out"
    )


def test_a_cut_download_goes_on_where_it_was_cut(hub: FakeHub, child: Downloader) -> None:
    """Within one start a connection that breaks twice costs no piece that had arrived."""
    repo = hub.add("tiny/cut", LARGE)
    hub.faults = Faults(cut_after=[PIECE + 1000, PIECE + 1000])
    answer = child.download("tiny/cut")
    assert hub.ranges("large.gguf") == [None, f"bytes={PIECE}-", f"bytes={2 * PIECE}-"]
    assert (Path(answer["directory"]) / "large.gguf").read_bytes() == repo.files["large.gguf"]


def test_a_broken_download_is_finished_by_the_next_start(hub: FakeHub, child: Downloader) -> None:
    """A start that fails keeps every file it had whole; the next fetches only what was cut."""
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


def test_what_killed_downloads_left_is_removed(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """A file that nobody writes to any more is deleted; one in use is not."""
    hub.add("tiny/left", tiny_model_dir)
    blobs = Path(child.download("tiny/left")["directory"]).parents[1] / "blobs"
    old, new = blobs / "old.1234.incomplete", blobs / "new.1234.incomplete"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    child.download("tiny/left")
    assert (old.exists(), new.exists()) == (False, True)


# --- The whole way --------------------------------------------------------------------------------


class Worker:
    """The engine process, driven over its socket as the service does."""

    def __init__(self, env: dict[str, str], log: Path, model: ModelSettings) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(60)
        self._log = log
        with theirs, log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app.llm.engine.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stderr=file,
                cwd=PROJECT_ROOT,
                env=env,
            )
        self.send(
            Configure(
                model=model.model_dump(),
                max_running=2,
                echo_step_seconds=0,
                huggingface_token=GOOD_TOKEN,
                log_level="DEBUG",
                log_format="json",
            )
        )

    def send(self, message: Submit | Stop | Configure) -> None:
        """Send one command."""
        self._socket.sendall(pack(message))

    def receive(self) -> Report:
        """Wait for one report."""
        return unpack_report(self._read(body_length(self._read(HEADER_BYTES))))

    def _read(self, count: int) -> bytes:
        received = b""
        while len(received) < count:
            piece = self._socket.recv(count - len(received))
            assert piece, f"the worker has ended: {self._log.read_text()}"
            received += piece
        return received

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        code = self._process.wait(10)
        self._socket.close()
        return code

    def close(self) -> None:
        """End the process if it has not ended."""
        self._socket.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        self._process.wait()

    def logged(self) -> list[dict[str, Any]]:
        """The log; every line of it must be a JSON object."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]


def test_a_model_from_the_hub_generates(hub: FakeHub, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The engine process downloads over a cut connection, loads, generates, and logs JSON only."""
    repo = hub.add("tiny/gated", tiny_model_dir, gated=True)
    hub.faults = Faults(cut_after=[100_000])
    model = ModelSettings(
        name="tiny/gated", source="hub", engine="transformers", device="cpu", dtype="float32"
    )
    worker = Worker(environment(hub.url, tmp_path), tmp_path / "log.txt", model)
    try:
        said = []
        while isinstance(report := worker.receive(), Loading):
            said.append(report.message)
        assert isinstance(report, Ready), report
        assert (report.info.model, report.info.revision) == ("tiny/gated", repo.sha)
        assert (report.info.backend, report.info.device) == ("transformers", "cpu")
        sampling = SamplingParams(temperature=0)
        worker.send(
            Submit(GenerationRequest("r", prompt_token_ids=[5], max_tokens=4, sampling=sampling))
        )
        tokens: list[int] = []
        finish = None
        while finish is None:
            report = worker.receive()
            assert isinstance(report, Step)
            for event in report.events:
                tokens += event.token_ids
                finish = event.finish_reason
        worker.send(Stop())
        assert (len(tokens), finish, worker.wait()) == (4, "length", 0)
    finally:
        worker.close()
    assert said[-2:] == ["loading tiny/gated with transformers", "starting continuous batching"]
    assert {line["level"] for line in worker.logged()} <= {"WARNING"}
    assert GOOD_TOKEN not in (tmp_path / "log.txt").read_text()
    # Loading asks the hub for nothing beyond the download.
    assert set(hub.downloads("tiny/gated")) == set(repo.files)


def test_the_engine_process_ends_when_its_model_cannot_be_had(hub: FakeHub, tmp_path: Path) -> None:
    """A bad model is reported in one line, and the process exits with 1."""
    model = ModelSettings(name="tiny/missing", engine="transformers")
    worker = Worker(environment(hub.url, tmp_path), tmp_path / "log.txt", model)
    try:
        while isinstance(report := worker.receive(), Loading):
            pass
        assert isinstance(report, LoadFailed)
        assert report.message.startswith("tiny/missing is not on the hub")
        assert worker.wait() == 1
    finally:
        worker.close()
    assert worker.logged() == []


def test_the_service_ends_with_one_line(hub: FakeHub, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The default, gated model without a granted token stops the service: one line, no token."""
    hub.add(DEFAULT_MODEL, tiny_model_dir, gated=True)
    env = environment(
        hub.url,
        tmp_path,
        MODEL__NAME=DEFAULT_MODEL,
        MODEL__SOURCE="hub",
        LOGGING__FORMAT="json",
        SECURITY__API_KEY="canary-key",
    )
    services = [
        subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "app.main:app", "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=PROJECT_ROOT,
            env=env | {"HUGGINGFACE_TOKEN": token},
        )
        for token in ("", OTHER_TOKEN)
    ]
    try:
        for service, hint in zip(
            services, ("set HUGGINGFACE_TOKEN", "may not read it"), strict=True
        ):
            output, _ = service.communicate(timeout=60)
            assert service.returncode == EXIT_STARTUP_FAILED
            lines = [json.loads(line) for line in output.splitlines()]
            fatal = [line for line in lines if line["level"] in ("ERROR", "CRITICAL")]
            assert [line["level"] for line in fatal] == ["CRITICAL"]
            assert fatal[0]["message"].startswith(f"{DEFAULT_MODEL} is a gated model; ")
            assert hint in fatal[0]["message"]
            assert "MODEL__SOURCE=bundled" in fatal[0]["message"]
            for secret in ("Traceback", OTHER_TOKEN, "canary-key"):
                assert secret not in output
    finally:
        for service in services:
            service.kill()
            service.communicate()
