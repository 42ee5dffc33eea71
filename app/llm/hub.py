"""Downloads from the Hugging Face hub: only the files that are needed, and only safe ones.

Nothing here imports torch. Every failure becomes a :class:`ModelLoadError` that says what to do.
"""

import contextlib
import io
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

from app.llm.snapshot import OPENVINO_MODEL, Progress, Snapshot, choose_weights
from app.utils.errors import ModelLoadError

PROGRESS_SECONDS = 2.0
"""Least time between two reports of progress."""

# What a tokenizer, a configuration or a chat template may lie in, beside the weights.
_COMPANION_SUFFIXES = (".json", ".jinja", ".model", ".txt")
# A file that is being downloaded is written to all the time; one this old was left by a killed run.
_ABANDONED_SECONDS = 3600.0
_ALTERNATIVES = "choose another MODEL__NAME, or set MODEL__SOURCE=bundled"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What was asked for: a repository, a GGUF file in it if one is named, and a revision."""

    repo: str
    file: str | None
    revision: str | None
    openvino: bool


def download(
    name: str,
    *,
    revision: str | None,
    token: str | None,
    progress: Progress,
    openvino: bool = False,
) -> Snapshot:
    """Bring a hub model onto this machine, or find it in the cache.

    Args:
        name: ``owner/name``, or ``owner/name/FILE.gguf``.
        revision: Branch, tag or commit; ``None`` is the repository's default.
        token: Hub token; never logged.
        progress: Told how far it is.
        openvino: See :func:`choose_weights`.

    Raises:
        ModelLoadError: It cannot be had; the message says what to do.
    """
    wanted = _parse_name(name, revision, openvino=openvino)
    token = _checked_token(token)
    # The library would print beside the service's log what it also sends through it.
    logging.getLogger("huggingface_hub").handlers.clear()
    progress(f"looking up {wanted.repo} on the hub")
    try:
        return _download(wanted, token, progress)
    except HFValidationError:
        raise ModelLoadError(
            f"{name!r} is not a hub repository name (owner/name): correct MODEL__NAME; "
            "for a path set MODEL__SOURCE=local"
        ) from None
    except HfHubHTTPError as error:
        raise ModelLoadError(_explain_refusal(error, wanted, has_token=bool(token))) from None
    except OSError as error:
        raise ModelLoadError(
            f"{wanted.repo} cannot be downloaded to {constants.HF_HUB_CACHE}: "
            f"{' '.join(str(error).split())}; free some space, make it writable, or set HF_HOME "
            "to another folder"
        ) from None
    except ValueError:
        raise ModelLoadError(
            "the server in HF_ENDPOINT does not answer as a hub does: correct HF_ENDPOINT or "
            "leave it out"
        ) from None


def _parse_name(name: str, revision: str | None, *, openvino: bool) -> _Wanted:
    parts = PurePosixPath(name).parts
    if len(parts) > 2 and name.endswith(".gguf"):
        return _Wanted("/".join(parts[:2]), "/".join(parts[2:]), revision, openvino)
    return _Wanted(name, None, revision, openvino)


def _checked_token(token: str | None) -> str | None:
    """The token without the line end that secret files carry.

    Raises:
        ModelLoadError: It cannot be sent; the HTTP client's own error would quote it.
    """
    token = (token or "").strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ModelLoadError(
            "HUGGINGFACE_TOKEN holds characters that no token has: copy it again from the hub"
        )
    return token or None


def _explain_refusal(error: HfHubHTTPError, wanted: _Wanted, *, has_token: bool) -> str:
    """One line on what the hub refused, and what to do."""
    repo, status = wanted.repo, error.response.status_code
    if isinstance(error, GatedRepoError):
        hint = (
            "the token in HUGGINGFACE_TOKEN may not read it: accept its licence on the hub with "
            "the account the token belongs to"
            if has_token
            else "accept its licence on the hub and set HUGGINGFACE_TOKEN"
        )
        return f"{repo} is a gated model; {hint}, {_ALTERNATIVES}"
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{repo} has no revision {wanted.revision!r}: correct MODEL__REVISION or leave it out"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repo} is not on the hub, or is private: check MODEL__NAME, set HUGGINGFACE_TOKEN "
            "if it is private, or set MODEL__SOURCE=local for a path"
        )
    if status in (401, 403) and has_token:
        return (
            f"the hub refuses the token in HUGGINGFACE_TOKEN ({status}): correct it, or leave it "
            "out for a model that is not gated"
        )
    return f"the hub answered {status} for {repo}: try again later, {_ALTERNATIVES}"


def _download(wanted: _Wanted, token: str | None, progress: Progress) -> Snapshot:
    try:
        info = HfApi(token=token or False).model_info(
            wanted.repo, revision=wanted.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except OfflineModeIsEnabled:
        return _from_cache(wanted, progress, "HF_HUB_OFFLINE is set", "unset it")
    except httpx.TransportError:
        advice = "check the network and HF_ENDPOINT"
        return _from_cache(wanted, progress, "the hub cannot be reached", advice)
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status < 500 and status != httpx.codes.TOO_MANY_REQUESTS:
            raise
        return _from_cache(wanted, progress, f"the hub answered {status}", "try again later")
    if info.sha is None:
        raise ValueError("the hub named no commit")
    names = [sibling.rfilename for sibling in info.siblings or []]
    weights = choose_weights(names, wanted.repo, wanted.file, openvino=wanted.openvino)
    files = _needed(names, weights)
    cache = _cache_folder(wanted.repo)
    _remove_abandoned(cache)
    progress(f"downloading {wanted.repo} ({len(files)} files)")
    try:
        directory = snapshot_download(
            wanted.repo,
            # The commit that was just looked up: a push in between must not mix two versions.
            revision=info.sha,
            token=token or False,
            allow_patterns=files,
            tqdm_class=_progress_bar(wanted.repo, progress),
        )
    except (httpx.TransportError, LocalEntryNotFoundError, XetDownloadError):
        raise ModelLoadError(
            f"the connection to the hub broke while downloading {wanted.repo}: start again; "
            "files that were complete are kept"
        ) from None
    _remember(cache, wanted.revision, info.sha)
    return Snapshot(Path(directory), weights, info.sha)


def _from_cache(wanted: _Wanted, progress: Progress, reason: str, advice: str) -> Snapshot:
    """The model as it was last downloaded, if all of it was."""
    repo, revision = wanted.repo, wanted.revision
    try:
        # Nothing matches the empty list, so this finds the folder without judging its contents.
        folder = snapshot_download(
            repo, revision=revision, local_files_only=True, allow_patterns=[]
        )
        try:
            names = [file.path for file in get_cached_repo_tree(repo, revision=revision)]
        except CachedRepoTreeNotFoundError:
            # Another program downloaded it; what lies there is all there is to know.
            files = (path for path in Path(folder).rglob("*") if path.is_file())
            names = [path.relative_to(folder).as_posix() for path in files]
        weights = choose_weights(names, repo, wanted.file, openvino=wanted.openvino)
        directory = Path(
            snapshot_download(
                repo,
                revision=revision,
                local_files_only=True,
                allow_patterns=_needed(names, weights),
            )
        )
    except LocalEntryNotFoundError as error:
        whole = "whole " if isinstance(error, IncompleteSnapshotError) else ""
        raise ModelLoadError(
            f"{reason}, and {repo} is not {whole}in the cache: {advice}, {_ALTERNATIVES}"
        ) from None
    progress(f"{reason}; using {repo} from the cache")
    # The cache names a snapshot's folder by its commit.
    return Snapshot(directory, weights, directory.name)


def _cache_folder(repo: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _remember(cache: Path, revision: str | None, commit: str) -> None:
    """Note which commit a branch or tag stands for, so that it is found without the hub.

    ``snapshot_download`` does so only when it looks the revision up itself. This is the cache's
    documented layout, and written last: a download that broke must not hide an older, whole one.
    """
    ref = cache / "refs" / (revision or constants.DEFAULT_REVISION)
    if ref.name == commit:
        return
    # A whole model in a cache that is mounted read-only can be served all the same.
    with contextlib.suppress(OSError):
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit, encoding="ascii")


def _remove_abandoned(cache: Path) -> None:
    """Delete what killed downloads left; nothing goes on from it, and it fills the disk."""
    for path in cache.glob("blobs/*.incomplete"):
        # It may be gone by now, or belong to somebody else.
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def _needed(names: list[str], weights: str | None) -> list[str]:
    """Weights and their companions; nothing from subfolders, which hold other formats."""
    top = [n for n in names if "/" not in n]
    companions = [n for n in top if n.endswith(_COMPANION_SUFFIXES)]
    if weights == OPENVINO_MODEL:
        own = [n for n in top if n.startswith("openvino_") and n.endswith((".xml", ".bin"))]
        return [*companions, *own]
    if weights:
        return [*companions, weights]
    tensors = [n for n in top if n.endswith(".safetensors")]
    # Beside transformers' own files some repositories hold the same weights in a second layout.
    own = [n for n in tensors if n.startswith("model")]
    return [*companions, *(own or tensors)]


def _progress_bar(repo: str, progress: Progress) -> type[hub_tqdm]:
    """A progress bar that reports lines instead of drawing."""
    lock = threading.Lock()
    last = time.monotonic()

    class ReportingBar(hub_tqdm):
        # A bar that draws nothing needs no thread that looks after its drawing.
        monitor_interval = 0

        def __init__(self, *args: Any, name: str | None = None, **kwargs: Any) -> None:
            # One bar counts what comes in, another what is written; one of them is enough.
            self._counts_bytes = kwargs.get("unit") == "B" and not str(name).endswith(".transfer")
            kwargs |= {"disable": False, "file": io.StringIO()}
            # hub_tqdm's own __init__ turns a bar off where HF_HUB_DISABLE_PROGRESS_BARS is set.
            super(hub_tqdm, self).__init__(*args, **kwargs)

        def display(self, *_args: Any, **_kwargs: Any) -> None:
            """Draw nothing: a server's log is not a terminal."""

        def update(self, n: float | None = 1) -> None:
            nonlocal last
            super().update(n)
            with lock:
                due = self._counts_bytes and time.monotonic() - last >= PROGRESS_SECONDS
                if due:
                    last = time.monotonic()
            if due and self.total:
                share = 100 * self.n / self.total
                progress(f"downloading {repo}: {share:.0f} % of {self.total / 1e6:.0f} MB")

    return ReportingBar
