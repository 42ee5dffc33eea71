"""Downloads from the Hugging Face hub: only the files that are needed, and only safe ones.

Nothing here imports torch. Every failure becomes a :class:`ModelLoadError` that says what to do.
"""

import contextlib
import io
import logging
import ssl
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
from huggingface_hub import HfApi, constants, errors, get_cached_repo_tree, snapshot_download
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented
from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

from app.llm.models.progress import Progress, Transfer
from app.llm.models.snapshot import (
    OPENVINO_MODEL,
    Snapshot,
    check_storage,
    choose_weights,
    is_gguf,
)
from app.utils.errors import ModelLoadError

# Suffixes of the files that hold a tokenizer, a configuration or a chat template.
_COMPANION_SUFFIXES = (".json", ".jinja", ".model", ".txt")
# A download writes to its file all the time: one this old was left behind by a killed process.
_ABANDONED_SECONDS = 3600.0
_ALTERNATIVES = "choose another MODEL__NAME, or set MODEL__SOURCE=bundled"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The request: a repository, a GGUF file in it if one is named, and a revision."""

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
    """Download ``owner/name`` or ``owner/name/FILE.gguf`` from the hub, or find it in the cache.

    The revision is a branch, tag or commit. The token is never logged.

    Raises:
        ModelLoadError: The model is not available; the message says what to do.
    """
    check(name, token=token)
    repo, file = _split(name)
    wanted = _Wanted(repo, file, revision, openvino)
    token = _checked_token(token)
    # The library would print its log lines a second time, beside the service's log.
    logging.getLogger("huggingface_hub").handlers.clear()
    progress(f"looking up {wanted.repo} on the hub")
    try:
        return _download(wanted, token, progress)
    except errors.HfHubHTTPError as error:
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


def check(name: str, *, token: str | None) -> None:
    """Check what is known without the network: the name, the token's form, the cache's folder.

    Raises:
        ModelLoadError: The model cannot be downloaded.
    """
    _checked_token(token)
    repo, _ = _split(name)
    try:
        validate_repo_id(repo)
    except errors.HFValidationError:
        raise ModelLoadError(
            f"{name!r} is not a hub repository name (owner/name): correct MODEL__NAME; "
            "for a path set MODEL__SOURCE=local"
        ) from None
    # A whole model can be served from a cache that is mounted read-only.
    if not _folder(repo).exists():
        check_storage(Path(constants.HF_HUB_CACHE))


def _split(name: str) -> tuple[str, str | None]:
    """The repository, and the GGUF file in it if one is named."""
    parts = PurePosixPath(name).parts
    if len(parts) > 2 and is_gguf(name):
        return "/".join(parts[:2]), "/".join(parts[2:])
    return name, None


def _folder(repo: str) -> Path:
    """Folder of a repository in the cache, whose layout is documented."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def _checked_token(token: str | None) -> str | None:
    """The token without the trailing line break of a secret file."""
    token = (token or "").strip()
    # The HTTP client's own error would quote the token.
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ModelLoadError(
            "HUGGINGFACE_TOKEN holds characters that no token has: copy it again from the hub"
        )
    return token or None


def _explain_refusal(error: errors.HfHubHTTPError, wanted: _Wanted, *, has_token: bool) -> str:
    repo, status = wanted.repo, error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        hint = (
            "the token in HUGGINGFACE_TOKEN may not read it: accept its licence on the hub with "
            "the account the token belongs to"
            if has_token
            else "accept its licence on the hub and set HUGGINGFACE_TOKEN"
        )
        return f"{repo} is a gated model; {hint}, {_ALTERNATIVES}"
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{repo} has no revision {wanted.revision!r}: correct MODEL__REVISION or leave it out"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
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
    except errors.OfflineModeIsEnabled:
        return _from_cache(wanted, progress, "HF_HUB_OFFLINE is set", "unset it")
    except httpx.TransportError as error:
        return _from_cache(wanted, progress, *_explain_transport(error))
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status < 500 and status != httpx.codes.TOO_MANY_REQUESTS:
            raise
        return _from_cache(wanted, progress, f"the hub answered {status}", "try again later")
    if info.sha is None:
        raise ValueError("the hub named no commit")
    names = [sibling.rfilename for sibling in info.siblings or []]
    weights = choose_weights(names, wanted.repo, wanted.file, openvino=wanted.openvino)
    files = _needed(names, weights)
    cache = _folder(wanted.repo)
    _remove_abandoned(cache)
    progress(f"downloading {wanted.repo} ({len(files)} files)")
    try:
        directory = snapshot_download(
            wanted.repo,
            # A commit, not a branch: a push in between must not mix two versions.
            revision=info.sha,
            token=token or False,
            allow_patterns=files,
            tqdm_class=_progress_bar(wanted.repo, progress),
        )
    except (httpx.TransportError, errors.LocalEntryNotFoundError, errors.XetDownloadError):
        raise ModelLoadError(
            f"the connection to the hub broke while downloading {wanted.repo}: start again; "
            "files that were complete are kept"
        ) from None
    _remember(cache, wanted.revision, info.sha)
    return Snapshot(Path(directory), weights, info.sha)


def _explain_transport(error: BaseException | None) -> tuple[str, str]:
    """Why there is no connection, and what to do."""
    while error is not None:
        if isinstance(error, ssl.SSLError):
            why = getattr(error, "verify_message", "") or error.reason or "no reason given"
            advice = "set SSL_CERT_FILE to the certificates of your network, or correct HF_ENDPOINT"
            return f"the TLS connection to the hub failed ({why})", advice
        error = error.__cause__ or error.__context__
    return "the hub cannot be reached", "check the network and HF_ENDPOINT"


def _from_cache(wanted: _Wanted, progress: Progress, reason: str, advice: str) -> Snapshot:
    """Find the last download of the model, if it is complete."""
    repo, revision = wanted.repo, wanted.revision
    try:
        # The empty list matches no file, so the folder is found even where files are missing.
        folder = snapshot_download(
            repo, revision=revision, local_files_only=True, allow_patterns=[]
        )
        try:
            names = [file.path for file in get_cached_repo_tree(repo, revision=revision)]
        except errors.CachedRepoTreeNotFoundError:
            # Another program downloaded it, so the files in the folder are taken for all there are.
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
    except errors.LocalEntryNotFoundError as error:
        whole = "whole " if isinstance(error, errors.IncompleteSnapshotError) else ""
        raise ModelLoadError(
            f"{reason}, and {repo} is not {whole}in the cache: {advice}, {_ALTERNATIVES}"
        ) from None
    progress(f"{reason}; using {repo} from the cache")
    # The cache names a snapshot's folder by its commit.
    return Snapshot(directory, weights, directory.name)


def _remember(cache: Path, revision: str | None, commit: str) -> None:
    """Record the commit of a branch or tag, so that it is found without the hub.

    ``snapshot_download`` records it only when it looks the revision up itself. This is written
    last, so that a broken download hides no older, whole one.
    """
    ref = cache / "refs" / (revision or constants.DEFAULT_REVISION)
    if ref.name == commit:
        return
    # A whole model can be served from a cache that is mounted read-only.
    with contextlib.suppress(OSError):
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit, encoding="ascii")


def _remove_abandoned(cache: Path) -> None:
    """Delete the partial files of killed downloads, which are never resumed and fill the disk."""
    for path in cache.glob("blobs/*.incomplete"):
        # The file may be gone by now, or belong to another user.
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def _needed(names: list[str], weights: str | None) -> list[str]:
    """The weights and the files beside them; subfolders hold other formats."""
    top = [n for n in names if "/" not in n]
    companions = [n for n in top if n.endswith(_COMPANION_SUFFIXES)]
    if weights == OPENVINO_MODEL:
        own = [n for n in top if n.startswith("openvino_") and n.endswith((".xml", ".bin"))]
        return [*companions, *own]
    if weights:
        return [*companions, weights]
    tensors = [n for n in top if n.endswith(".safetensors")]
    # Some repositories hold the same weights twice: as transformers' files and in another layout.
    own = [n for n in tensors if n.startswith("model")]
    return [*companions, *(own or tensors)]


def _progress_bar(repo: str, progress: Progress) -> type[hub_tqdm]:
    """A class of progress bars that call ``progress`` instead of drawing."""
    transfer = Transfer(f"downloading {repo}", progress)

    class ReportingBar(hub_tqdm):
        # No monitor thread: nothing is drawn.
        monitor_interval = 0

        def __init__(self, *args: Any, name: str | None = None, **kwargs: Any) -> None:
            # One bar counts bytes received, another bytes written: only the latter reports.
            self._counts_bytes = kwargs.get("unit") == "B" and not str(name).endswith(".transfer")
            kwargs |= {"disable": False, "file": io.StringIO()}
            # hub_tqdm's __init__ is skipped: HF_HUB_DISABLE_PROGRESS_BARS would turn the bar off.
            super(hub_tqdm, self).__init__(*args, **kwargs)

        def display(self, *_args: Any, **_kwargs: Any) -> None:
            """Draw nothing."""

        def update(self, n: float | None = 1) -> None:
            super().update(n)
            if self._counts_bytes:
                transfer.came(self.n, self.total or 0)

    return ReportingBar
