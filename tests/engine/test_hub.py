"""Models from the hub: the files that are downloaded, and access to them."""

from pathlib import Path

import pytest

from tests.support.fake_hub import FakeHub
from tests.support.hub_processes import GOOD_TOKEN, OTHER_TOKEN, UNKNOWN_TOKEN, Downloader

# --- What is downloaded ---------------------------------------------------------------------------


def test_a_model_is_downloaded_whole(hub: FakeHub, child: Downloader, tiny_model_dir: Path) -> None:
    """A download brings the same bytes, gives the commit, and says what it does."""
    repo = hub.add("tiny/whole", tiny_model_dir)
    answer = child.download("tiny/whole")
    assert (answer["gguf"], answer["revision"]) == (None, repo.sha)
    for name, content in repo.files.items():
        assert (Path(answer["directory"]) / name).read_bytes() == content
    assert answer["said"][:2] == [
        "looking up tiny/whole on the hub",
        "downloading tiny/whole (6 files)",
    ]


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
    """Files that are in the cache at the hub's commit are not downloaded again."""
    hub.add("tiny/twice", tiny_model_dir)
    first = child.download("tiny/twice")
    hub.requests.clear()
    assert child.download("tiny/twice")["directory"] == first["directory"]
    assert hub.downloads("tiny/twice") == []


def test_a_branch_is_recorded_as_its_commit(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """A branch, a tag and a commit all lead to the same reported commit."""
    repo = hub.add("tiny/branches", tiny_model_dir)
    repo.branches = ("v1.0", "refs/pr/1")
    for revision in ("main", "v1.0", "refs/pr/1", repo.sha):
        assert child.download("tiny/branches", revision=revision)["revision"] == repo.sha


def test_a_pinned_commit_stays_pinned(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """After a push to the branch a download gives the new commit and contents, never a mixture."""
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
    """The error names a revision that does not exist, and says what to do."""
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


def test_openvinos_format_is_used_where_it_can_run(hub: FakeHub, child: Downloader) -> None:
    """Only OpenVINO's files are downloaded; other engines get safetensors, or an error."""
    own = {
        "openvino_model.xml": b"<net>",
        "openvino_model.bin": b"weights",
        "openvino_tokenizer.xml": b"<net/>",
        "openvino_tokenizer.bin": b"strings",
        "config.json": b"{}",
    }
    hub.add("tiny/openvino", own | {"training.bin": b"other"})
    answer = child.download("tiny/openvino", openvino=True)
    assert (answer["gguf"], answer["openvino"]) == (None, True)
    assert set(hub.downloads("tiny/openvino")) == set(own)
    assert child.download("tiny/openvino")["error"] == (
        "tiny/openvino has only OpenVINO weights: set MODEL__DEVICE=cpu and MODEL__ENGINE=auto, or "
        "choose a model with safetensors or GGUF weights"
    )
    hub.add("tiny/both", own | {"model.safetensors": b"weights"})
    assert child.download("tiny/both")["openvino"] is False
    assert set(hub.downloads("tiny/both")) == {"config.json", "model.safetensors"}


def test_one_of_several_gguf_files_is_named(hub: FakeHub, child: Downloader) -> None:
    """Several GGUF files are rejected with the exact setting that chooses one, and it does."""
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
    """A repository with only pickled weights is rejected before any of it is downloaded."""
    hub.add("tiny/pickle", {"config.json": b"{}", pickle: b"\x80\x04", "x/model.safetensors": b""})
    error = child.download("tiny/pickle")["error"]
    assert error.startswith("tiny/pickle has only pickled weights")
    assert "choose a model with safetensors or GGUF weights" in error
    assert hub.downloads("tiny/pickle") == []


def test_a_repository_without_weights_is_refused(hub: FakeHub, child: Downloader) -> None:
    """The error says that a repository has no weights."""
    hub.add("tiny/empty", {"README.md": b"-"})
    assert child.download("tiny/empty")["error"].startswith("tiny/empty has no weights: choose")


# --- Access ---------------------------------------------------------------------------------------


def test_a_gated_model_without_a_token(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """The error names all four remedies: licence, token, another model, the bundled one."""
    hub.add("tiny/gated", tiny_model_dir, gated=True)
    error = child.download("tiny/gated")["error"]
    assert error == (
        "tiny/gated is a gated model; accept its licence on the hub and set HUGGINGFACE_TOKEN, "
        "choose another MODEL__NAME, or set MODEL__SOURCE=bundled"
    )
    assert all(request.authorization is None for request in hub.requests)


def test_a_gated_model_with_a_token_without_access(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """The error for a valid token whose account has not accepted the licence says to do so."""
    hub.add("tiny/gated", tiny_model_dir, gated=True)
    error = child.download("tiny/gated", token=OTHER_TOKEN)["error"]
    assert error.startswith("tiny/gated is a gated model; the token in HUGGINGFACE_TOKEN may not")
    assert "accept its licence" in error
    assert "MODEL__SOURCE=bundled" in error


@pytest.mark.parametrize("gated", [True, False])
def test_a_token_the_hub_does_not_know(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path, *, gated: bool
) -> None:
    """The error blames a mistyped or revoked token, not the hub or the model."""
    hub.add("tiny/gated", tiny_model_dir, gated=gated)
    assert child.download("tiny/gated", token=UNKNOWN_TOKEN)["error"] == (
        "the hub refuses the token in HUGGINGFACE_TOKEN (401): correct it, or leave it out for a "
        "model that is not gated"
    )


def test_a_gated_model_with_a_good_token(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """The token gives access, is sent only to the hub, and may end in a line break."""
    repo = hub.add("tiny/gated", tiny_model_dir, gated=True)
    answer = child.download("tiny/gated", token=f"{GOOD_TOKEN}\n")
    assert answer["revision"] == repo.sha
    to_hub = {r.authorization for r in hub.requests if r.host == "127.0.0.1"}
    elsewhere = {r.authorization for r in hub.requests if r.host != "127.0.0.1"}
    assert (to_hub, elsewhere) == ({f"Bearer {GOOD_TOKEN}"}, {None})


@pytest.mark.parametrize("token", ["hf_a b", "hf_“quoted”", "hf_a\nhf_b"])
def test_a_token_that_cannot_be_sent(hub: FakeHub, child: Downloader, token: str) -> None:
    """A token that no header can hold is rejected, without a request and without quoting it."""
    assert child.download("tiny/any", token=token)["error"] == (
        "HUGGINGFACE_TOKEN holds characters that no token has: copy it again from the hub"
    )
    assert hub.requests == []


def test_a_private_model_without_a_token(
    hub: FakeHub, child: Downloader, tiny_model_dir: Path
) -> None:
    """A private repository looks missing, and the error says that a token may be needed."""
    hub.add("tiny/private", tiny_model_dir, private=True)
    error = child.download("tiny/private")["error"]
    assert error.startswith("tiny/private is not on the hub, or is private: check MODEL__NAME")
    assert "HUGGINGFACE_TOKEN" in error


@pytest.mark.parametrize("token", [None, OTHER_TOKEN])
def test_a_model_that_does_not_exist(hub: FakeHub, child: Downloader, token: str | None) -> None:
    """A misspelt name gets the same error whether the hub answers 401 or 404."""
    error = child.download("tiny/missing", token=token)["error"]
    assert error == (
        "tiny/missing is not on the hub, or is private: check MODEL__NAME, set HUGGINGFACE_TOKEN "
        "if it is private, or set MODEL__SOURCE=local for a path"
    )


@pytest.mark.parametrize(
    "name", ["a/b/c", "/srv/models/x", "/srv/models/x.gguf", "../x", "a b/c", "a/../b", "ü/x", "."]
)
def test_a_name_that_is_no_repository(hub: FakeHub, child: Downloader, name: str) -> None:
    """A name that cannot be a repository's is rejected without a request."""
    error = child.download(name)["error"]
    assert error.endswith(
        " is not a hub repository name (owner/name): correct MODEL__NAME; "
        "for a path set MODEL__SOURCE=local"
    )
    assert hub.requests == []


def test_no_token_is_ever_logged(child: Downloader) -> None:
    """After all the tests above, the process's log at level DEBUG holds no token."""
    for secret in (GOOD_TOKEN, OTHER_TOKEN, UNKNOWN_TOKEN):
        assert secret not in child.log
