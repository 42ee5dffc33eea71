"""Finds the model (bundled, hub, local) and chooses the backend that runs it.

Weights are safetensors, GGUF or OpenVINO's own format; pickles and code from a repository are
refused. Every foreseeable failure is a :class:`ModelLoadError` of one line.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from app.core.config import ModelSettings
from app.core.logging import get_logger
from app.llm.engine.echo import EchoBackend
from app.llm.engine.openvino.loading import (
    OPENVINO_REASONS,
    OpenVinoUnsupportedError,
    check_gguf,
    load_openvino,
)
from app.llm.engine.transformers.loading import check_device, choose_bits, load_transformers
from app.llm.engine.vllm.loading import load_vllm
from app.llm.models import bundled
from app.llm.models.description import load_tokenizer, read_gguf
from app.llm.models.files import check_files, check_folder
from app.llm.models.load_errors import explaining
from app.llm.models.progress import Progress, Transfer
from app.llm.models.snapshot import Snapshot, check_storage, choose_weights
from app.llm.protocol import Backend, EngineInfo, GenerationRequest, SamplingParams
from app.utils.errors import ModelLoadError

log = get_logger("engine")


def load_backend(
    settings: ModelSettings,
    *,
    max_running: int,
    echo_step_seconds: float,
    vllm_arguments: dict[str, Any] | None = None,
    token: str | None,
    progress: Progress,
    fetch_progress: Progress | None = None,
    loaded: Callable[[EngineInfo], None] = lambda _: None,
) -> Backend:
    """Load the configured model and start the backend that runs it.

    ``vllm_arguments`` are those of :func:`~app.llm.engine.vllm.loading.load_vllm`.
    ``progress`` is called with each stage of loading, and ``fetch_progress`` in its place while the
    model's files are fetched. ``loaded`` is called with the model's description, before the
    warm-up. ``token`` is the hub's, for gated models.

    Raises:
        ModelLoadError: The model cannot be loaded; one line that says what to do.
    """
    if settings.engine == "echo":
        echo = EchoBackend(step_seconds=echo_step_seconds)
        loaded(echo.info)
        return echo
    check_device(settings)
    snapshot = find_model(settings, token=token, progress=fetch_progress or progress)
    check_files(snapshot)
    if why_vllm := _why_vllm(settings, snapshot):
        vllm = load_vllm(
            settings,
            snapshot,
            why_vllm,
            vllm_arguments or {},
            max_running=max_running,
            progress=progress,
        )
        with explaining("engine", settings, snapshot):
            return _try_out(vllm, loaded)
    reason = _why_not_openvino(settings, snapshot)
    if reason is None:
        try:
            backend = load_openvino(settings, snapshot, max_running=max_running, progress=progress)
        except OpenVinoUnsupportedError as error:
            reason = _explain_unsupported(settings, snapshot, error)
            log.warning("%s; transformers will", reason)
            reason = f"model.engine is auto, but {reason}"
        else:
            with explaining("model", settings, snapshot):
                return _try_out(backend, loaded)
    backend = load_transformers(
        settings, snapshot, reason, max_running=max_running, progress=progress
    )
    with explaining("engine", settings, snapshot):
        return _try_out(backend, loaded)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a start would do with a model.

    Attributes:
        engine: Name of the engine; ``None`` where it depends on files that are not here.
        reason: Why it is this one.
        snapshot: The model's files; ``None`` where there are none, or they must be fetched first.
    """

    engine: str | None
    reason: str
    snapshot: Snapshot | None = None


def check_model(settings: ModelSettings, *, max_running: int, token: str | None) -> Plan:
    """Check the device, and the model as far as its files are here, without loading weights.

    A model that would have to be downloaded is not looked up.

    Raises:
        ModelLoadError: As :func:`load_backend`.
    """
    if settings.engine == "echo":
        return Plan("echo", "model.engine is echo")
    check_device(settings)
    if settings.source == "hub":
        from huggingface_hub import is_offline_mode

        from app.llm.models import hub

        hub.check(settings.name, token=token)
        is_here = is_offline_mode()
    else:
        is_here = settings.source == "local" or bundled.is_fetched()
    if not is_here:
        _why_not_openvino(settings, None)
        if settings.source == "bundled":
            check_storage(bundled.bundled_model_path().parent)
        return Plan(None, "the model's files decide")
    snapshot = find_model(settings, token=token, progress=lambda *_: None)
    check_files(snapshot)
    return _plan(settings, snapshot, max_running)


def _plan(settings: ModelSettings, snapshot: Snapshot, max_running: int) -> Plan:
    header = read_gguf(settings, snapshot) if snapshot.gguf else None
    if header is None:
        load_tokenizer(settings, snapshot)
    if why_vllm := _why_vllm(settings, snapshot):
        return Plan("vllm", why_vllm, snapshot)
    reason = _why_not_openvino(settings, snapshot)
    if reason is None:
        try:
            if header is not None:
                check_gguf(header)
        except OpenVinoUnsupportedError as error:
            reason = _explain_unsupported(settings, snapshot, error)
            reason = f"model.engine is auto, but {reason}"
        else:
            return Plan("openvino", OPENVINO_REASONS[settings.engine], snapshot)
    if settings.device == "cpu":
        _, why = choose_bits(settings, snapshot, header, max_running)
        reason = f"{reason}; {why}"
    return Plan("transformers", reason, snapshot)


def _explain_unsupported(
    settings: ModelSettings, snapshot: Snapshot, error: OpenVinoUnsupportedError
) -> str:
    """The reason to take transformers in place of OpenVINO.

    Raises:
        ModelLoadError: Transformers may not, or cannot either.
    """
    reason = f"OpenVINO cannot run {settings.label}: {error}"
    if snapshot.is_openvino:
        raise ModelLoadError(f"{reason}; choose another model")
    if settings.engine == "openvino":
        raise ModelLoadError(f"{reason}; choose another model, or set MODEL__ENGINE=auto")
    return reason


def _try_out(backend: Backend, loaded: Callable[[EngineInfo], None]) -> Backend:
    """Warm up with a short generation, so that the first caller waits for no kernel to compile.

    It is greedy, because OpenVINO's sampling takes NaN for equal chances.

    Raises:
        ModelLoadError: The model computes NaN.
    """
    loaded(backend.info)
    request = GenerationRequest(
        id="warm-up",
        prompt_token_ids=[0] * 64,
        max_tokens=2,
        sampling=SamplingParams(temperature=0),
        logprobs=True,
    )
    backend.add(request)
    if _computes_nan(backend):
        raise ModelLoadError(
            f"{backend.info.model} computes NaN, which is no number: download it again, set "
            "MODEL__DTYPE=float32, or choose another model"
        )
    return backend


def _computes_nan(backend: Backend) -> bool:
    try:
        while backend.has_work():
            if any(math.isnan(value) for event in backend.step() for value in event.logprobs):
                return True
    except RuntimeError as error:
        # OpenVINO names the function that found it.
        if "isnan" not in str(error):
            raise
        return True
    return False


def _why_vllm(settings: ModelSettings, snapshot: Snapshot) -> str | None:
    """The reason to run the model with vLLM; ``None`` where another engine is to run it.

    Raises:
        ModelLoadError: ``model.engine`` is ``vllm``, which cannot run the model.
    """
    if settings.engine == "auto":
        fits = settings.device == "cuda" and snapshot.weights is None
        found = fits and find_spec("vllm") is not None
        return "model.engine is auto, and vLLM is the fastest on a GPU" if found else None
    if settings.engine != "vllm":
        return None
    if snapshot.weights is not None:
        raise ModelLoadError(
            "model.engine is vllm, which reads safetensors, and the weights are "
            f"{snapshot.weights}: choose another model, or set MODEL__ENGINE=auto"
        )
    if settings.quantization in {"int8", "int4"}:
        raise ModelLoadError(
            f"model.quantization is {settings.quantization}, which only transformers computes: set "
            "MODEL__QUANTIZATION=auto, or ENGINE__QUANTIZATION to a kind that vLLM knows"
        )
    return "model.engine is vllm"


def _why_not_openvino(settings: ModelSettings, snapshot: Snapshot | None) -> str | None:
    """The reason to run the model with transformers; ``None`` where OpenVINO is tried first.

    ``snapshot`` is ``None`` where the files are not known yet.

    Raises:
        ModelLoadError: ``model.engine`` is ``openvino``, which cannot run the model.
    """
    reason = _why_never_openvino(settings)
    if settings.engine == "openvino" and find_spec("openvino_genai") is None:
        raise ModelLoadError(
            "model.engine is openvino, but the package openvino-genai is not installed: install "
            "it, or set MODEL__ENGINE=auto"
        )
    is_asked = settings.quantization in {"int8", "int4"}
    if reason is None and snapshot and snapshot.weights and is_asked:
        reason = "OpenVINO computes in the precision that a model was converted to"
    if reason is None and snapshot and not snapshot.weights and settings.engine == "auto":
        reason = "safetensors are converted for OpenVINO where MODEL__ENGINE=openvino asks for it"
    if reason is None or settings.engine in ("transformers", "vllm"):
        return reason
    if settings.engine == "openvino":
        raise ModelLoadError(f"model.engine is openvino, but {reason}: set MODEL__ENGINE=auto")
    return f"model.engine is auto, and {reason}"


def _why_never_openvino(settings: ModelSettings) -> str | None:
    if settings.engine in ("transformers", "vllm"):
        return f"model.engine is {settings.engine}"
    if settings.device == "cuda":
        return (
            "model.device is cuda, where OpenVINO does not run, and vLLM is not installed "
            "(make install-vllm) or cannot read the model"
        )
    return None


def find_model(
    settings: ModelSettings,
    *,
    token: str | None,
    progress: Progress,
) -> Snapshot:
    """Bring the model's files onto this machine.

    Raises:
        ModelLoadError: The files are not available, or their format is refused.
    """
    if settings.source == "bundled":
        return _fetch_bundled(progress)
    # Safetensors are converted to the precision that is asked for.
    is_asked = settings.quantization in {"int8", "int4"}
    openvino = _why_never_openvino(settings) is None and not is_asked
    if settings.source == "local":
        return _find_local(Path(settings.name).expanduser(), openvino=openvino)
    # The client of the hub takes a tenth of a second to import.
    from app.llm.models import hub

    return hub.download(
        settings.name,
        revision=settings.revision,
        token=token,
        progress=progress,
        openvino=openvino,
    )


def _fetch_bundled(progress: Progress) -> Snapshot:
    if not bundled.is_fetched():
        check_storage(bundled.bundled_model_path().parent)
        progress("fetching the bundled model (93 MB, once)")
    try:
        path = bundled.fetch(
            bundled.BUNDLED, Transfer("downloading the bundled model", progress).came
        )
    except bundled.FetchError as error:
        raise ModelLoadError(str(error)) from None
    return Snapshot(path.parent, path.name, bundled.BUNDLED.sha256)


def _find_local(path: Path, *, openvino: bool) -> Snapshot:
    if path.is_file():
        choose_weights([path.name], str(path.parent), path.name)
        return Snapshot(path.parent, path.name)
    try:
        path = _snapshot_in(path)
        names = [entry.name for entry in path.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        raise ModelLoadError(
            f"{path} does not exist: set MODEL__NAME to a folder with safetensors or to a GGUF file"
        ) from None
    except OSError as error:
        raise ModelLoadError(
            f"{path} cannot be read ({error.strerror}): let this service's user read it"
        ) from None
    weights = choose_weights(names, str(path), openvino=openvino)
    check_folder(path)
    return Snapshot(path, weights)


def _snapshot_in(path: Path) -> Path:
    """The snapshot of the main branch, or the only one, in a model's folder in the hub's cache."""
    snapshots = path / "snapshots"
    if not snapshots.is_dir():
        return path
    folders = list(snapshots.iterdir())
    if (main := path / "refs" / "main").is_file():
        folders = [snapshots / main.read_text(encoding="utf-8").strip()]
    if len(folders) != 1:
        raise ModelLoadError(
            f"{path} is a folder of the hub's cache with {len(folders)} versions of a model: set "
            f"MODEL__NAME to a folder in {snapshots}"
        )
    return folders[0]
