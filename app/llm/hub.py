"""Downloads from the Hugging Face hub: only the files that are needed, and only safe ones.

Nothing here imports torch. Every failure becomes a :class:`ModelLoadError` that says what to do.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm as hub_tqdm

from app.utils.errors import ModelLoadError

Progress = Callable[[str], None]
"""Called with a line for the log and for /status."""

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# What a tokenizer, a configuration or a chat template may lie in, beside the weights.
_COMPANION_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_PROGRESS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model's files on this machine.

    Attributes:
        directory: Folder that holds them.
        gguf: Name of the GGUF file in it; ``None`` for safetensors.
        revision: Commit of the hub repository, where it came from one.
    """

    directory: Path
    gguf: str | None
    revision: str | None = None


def choose_weights(names: list[str], where: str, wanted: str | None = None) -> str | None:
    """Which file holds the weights: ``None`` for safetensors, else a GGUF file's name.

    Raises:
        ModelLoadError: There are only pickled weights, none at all, or several GGUF files.
    """
    gguf = sorted(n for n in names if n.endswith(".gguf"))
    if wanted:
        if wanted in names:
            return wanted
        raise ModelLoadError(
            f"{where} has no file {wanted}; it has {', '.join(gguf) or 'no GGUF file'}"
        )
    if any(n.endswith(".safetensors") for n in names):
        return None
    if len(gguf) == 1:
        return gguf[0]
    if gguf:
        raise ModelLoadError(
            f"{where} has several GGUF files: append one to MODEL__NAME, as in NAME/{gguf[0]}"
        )
    if any(n.endswith(_PICKLE_SUFFIXES) for n in names):
        raise ModelLoadError(
            f"{where} has only pickled weights, which can run code when they are loaded and are "
            "refused: choose a model with safetensors or GGUF weights"
        )
    raise ModelLoadError(f"{where} has no weights: safetensors or GGUF files are needed")


def download(name: str, *, revision: str | None, token: str | None, progress: Progress) -> Snapshot:
    """Bring a hub model onto this machine, or find it in the cache.

    Args:
        name: ``owner/name``, or ``owner/name/FILE.gguf``.
        revision: Branch, tag or commit; ``None`` is the repository's default.
        token: Hub token; never logged.
        progress: Told how far it is.

    Raises:
        ModelLoadError: It cannot be had; the message says what to do.
    """
    repo, wanted = _split_name(name)
    progress(f"looking up {repo} on the hub")
    try:
        return _download(repo, wanted, revision, token, progress)
    except GatedRepoError:
        hint = (
            "the token in HUGGINGFACE_TOKEN may not read it: accept its licence on the hub"
            if token
            else "accept its licence on the hub and set HUGGINGFACE_TOKEN"
        )
        raise ModelLoadError(f"{repo} is a gated model; {hint}, {_ALTERNATIVES}") from None
    except RevisionNotFoundError:
        raise ModelLoadError(
            f"{repo} has no revision {revision!r}: correct MODEL__REVISION or leave it out"
        ) from None
    except RepositoryNotFoundError:
        raise ModelLoadError(
            f"{repo} is not on the hub, or is private: check MODEL__NAME, set HUGGINGFACE_TOKEN "
            "if it is private, or set MODEL__SOURCE=local for a path"
        ) from None
    except HFValidationError:
        raise ModelLoadError(
            f"{name!r} is not a hub repository name (owner/name); for a path set MODEL__SOURCE=local"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        raise ModelLoadError(
            f"the hub answered {status} for {repo}: try again later, {_ALTERNATIVES}"
        ) from None
    except OSError as error:
        raise ModelLoadError(
            f"{repo} cannot be downloaded: {' '.join(str(error).split())}"
        ) from None


_ALTERNATIVES = "choose another MODEL__NAME, or set MODEL__SOURCE=bundled"


def _split_name(name: str) -> tuple[str, str | None]:
    parts = PurePosixPath(name).parts
    if len(parts) > 2 and name.endswith(".gguf"):
        return "/".join(parts[:2]), "/".join(parts[2:])
    return name, None


def _download(
    repo: str, wanted: str | None, revision: str | None, token: str | None, progress: Progress
) -> Snapshot:
    try:
        info = HfApi(token=token or False).model_info(repo, revision=revision)
    except (httpx.TransportError, OfflineModeIsEnabled):
        return _from_cache(repo, wanted, revision, progress)
    names = [sibling.rfilename for sibling in info.siblings or []]
    gguf = choose_weights(names, repo, wanted)
    files = _needed(names, gguf)
    progress(f"downloading {repo} ({len(files)} files)")
    try:
        directory = snapshot_download(
            repo,
            # The commit that was just looked up: a push in between must not mix two versions.
            revision=info.sha,
            token=token or False,
            allow_patterns=files,
            tqdm_class=_progress_bar(repo, progress),
        )
    except (httpx.TransportError, LocalEntryNotFoundError):
        raise ModelLoadError(
            f"the connection to the hub broke while downloading {repo}: start again, what was "
            "downloaded is kept"
        ) from None
    return Snapshot(Path(directory), gguf, info.sha)


def _from_cache(
    repo: str, wanted: str | None, revision: str | None, progress: Progress
) -> Snapshot:
    try:
        directory = Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        raise ModelLoadError(
            f"{repo} is not in the cache and the hub cannot be reached: check the network and "
            f"HF_ENDPOINT, {_ALTERNATIVES}"
        ) from None
    progress(f"the hub cannot be reached; using {repo} from the cache")
    names = [path.name for path in directory.iterdir()]
    # The cache names a snapshot's folder by its commit.
    return Snapshot(directory, choose_weights(names, repo, wanted), directory.name)


def _needed(names: list[str], gguf: str | None) -> list[str]:
    """Weights and their companions; nothing from subfolders, which hold other formats."""
    top = [n for n in names if "/" not in n]
    companions = [n for n in top if n.endswith(_COMPANION_SUFFIXES)]
    if gguf:
        return [*companions, gguf]
    return [*companions, *(n for n in top if n.endswith(".safetensors"))]


def _progress_bar(repo: str, progress: Progress) -> type[hub_tqdm]:
    """A progress bar that reports lines instead of drawing."""
    lock = threading.Lock()
    last = time.monotonic()

    class ReportingBar(hub_tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = False
            super().__init__(*args, **kwargs)

        def display(self, *_args: Any, **_kwargs: Any) -> None:
            """Draw nothing: a server's log is not a terminal."""

        def update(self, n: float | None = 1) -> None:
            nonlocal last
            super().update(n)
            with lock:
                due = self.unit == "B" and time.monotonic() - last >= _PROGRESS_SECONDS
                if due:
                    last = time.monotonic()
            if due and self.total:
                share = 100 * self.n / self.total
                progress(f"downloading {repo}: {share:.0f} % of {self.total / 1e6:.0f} MB")

    return ReportingBar
