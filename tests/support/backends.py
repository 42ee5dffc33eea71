"""The backends of the conformance tests; a new backend is a row in :data:`BACKENDS`."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from app.core.config import ModelSettings
from app.llm.client.process import VLLM_PYTHON
from app.llm.loader import load_backend
from app.llm.models.progress import Progress
from app.llm.protocol import Backend, GenerationRequest, SamplingParams, TokenEvent
from app.utils.errors import ModelLoadError
from tests.support.remote_backend import RemoteBackend
from tests.support.tiny_gguf import make_tiny_gguf
from tests.support.tiny_model import CONFIG, CONTEXT_LENGTH, HEADS, HIDDEN, KEY_VALUE_HEADS

MAX_RUNNING = 32
GREEDY = SamplingParams(temperature=0)
PROMPT = [10, 11, 12, 13, 14]


def _echo(_: Path) -> ModelSettings:
    return ModelSettings(engine="echo")


def _openvino(tiny: Path) -> ModelSettings:
    path = tiny.parent / "tiny.gguf"
    if not path.exists():
        make_tiny_gguf(path)
    return ModelSettings(source="local", name=str(path), engine="openvino", dtype="float32")


def _transformers(tiny: Path) -> ModelSettings:
    return ModelSettings(source="local", name=str(tiny), engine="transformers", dtype="float32")


def _plain(tiny: Path) -> ModelSettings:
    """The same model, with a kind of rotary embedding that the paged cache cannot serve."""
    path = tiny.parent / "plain"
    if not path.exists():
        shutil.copytree(tiny, path)
        ones = [1.0] * (HIDDEN // HEADS // 2)
        rope: dict[str, object] = {
            "rope_type": "longrope",
            "short_factor": ones,
            "long_factor": ones,
        }
        rope |= {"original_max_position_embeddings": CONTEXT_LENGTH - 1, "attention_factor": 1.0}
        change_config(path, rope_parameters=rope | {"rope_theta": CONFIG["rope_theta"]})
    return _transformers(path)


def _cuda(tiny: Path) -> ModelSettings:
    return _transformers(tiny).model_copy(update={"device": "cuda"})


def _wide(tiny: Path) -> ModelSettings:
    """The same weights with half as many heads, of a size that vLLM's attention has on a CPU."""
    path = tiny.parent / "wide"
    if not path.exists():
        shutil.copytree(tiny, path)
        heads = {"num_attention_heads": HEADS // 2, "num_key_value_heads": KEY_VALUE_HEADS // 2}
        change_config(path, head_dim=2 * HIDDEN // HEADS, **heads)
    return _transformers(path)


def _vllm(tiny: Path) -> ModelSettings:
    return _wide(tiny).model_copy(update={"engine": "vllm"})


BACKENDS: dict[str, Callable[[Path], ModelSettings]] = {
    "echo": _echo,
    "openvino": _openvino,
    "transformers": _transformers,
    "transformers-plain": _plain,
    "transformers-cuda": _cuda,
    "vllm": _vllm,
}
"""Functions from the tiny model's safetensors folder to settings that load it in float32."""


# Rows that another row is compared with.
_REFERENCES = {"vllm": _wide}


def reference(name: str, tiny: Path) -> ModelSettings:
    """The settings that run a row's model with transformers."""
    return _REFERENCES.get(name, _transformers)(tiny)


def change_config(model: Path, **changes: Any) -> None:
    """Change members of a model's config.json."""
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rows(*, with_echo: bool = True, with_plain: bool = False) -> list[Any]:
    """The names of :data:`BACKENDS` as test parameters; some have marks."""
    marks = {"transformers-cuda": pytest.mark.gpu, "vllm": pytest.mark.vllm}
    return [
        pytest.param(name, marks=marks.get(name, ()))
        for name in BACKENDS
        if (with_echo or name != "echo") and (with_plain or not name.endswith("-plain"))
    ]


def settings_of(name: str, tiny: Path) -> ModelSettings:
    """The settings of a row; skips the test if this machine does not have its device."""
    settings = BACKENDS[name](tiny)
    if settings.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    if settings.engine == "vllm":
        need_vllm()
    return settings


def need_vllm() -> None:
    """Skip a test for vLLM, unless ``make test-vllm`` runs it."""
    if not os.environ.get("TEST_VLLM"):
        pytest.skip("make test-vllm runs it")
    if not VLLM_PYTHON.exists():
        pytest.skip("vLLM is not installed in .tools/vllm")


def stages(said: list[str]) -> Progress:
    """Progress that appends the stages to ``said``, and leaves out how far each of them is."""
    return lambda message, percent=None: said.append(message) if percent is None else None


def load(
    settings: ModelSettings, said: list[str] | None = None, *, max_running: int = MAX_RUNNING
) -> Backend:
    """Load a backend, vLLM's in its own interpreter and the others in this process.

    The stages of loading are appended to ``said``.
    """
    if settings.engine == "vllm":
        return RemoteBackend(str(VLLM_PYTHON), settings, max_running)
    return load_backend(
        settings,
        max_running=max_running,
        echo_step_seconds=0,
        token=None,
        progress=stages([] if said is None else said),
    )


@cache
def load_bundled(engine: str) -> Backend:
    """Load the bundled model as it is served, once for all tests of this process."""
    return load(ModelSettings(source="bundled", engine=engine))


def load_local(path: Path, said: list[str] | None = None, **settings: Any) -> Backend:
    """Load a local model, by default in float32, for two requests in a batch."""
    values = {"source": "local", "name": str(path), "dtype": "float32"} | settings
    return load(ModelSettings(**values), said, max_running=2)


def refusal(path: Path, **settings: Any) -> str:
    """The error of a local model that is refused; checks that it is a line that says what to do."""
    with pytest.raises(ModelLoadError) as caught:
        load_local(path, **settings)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    assert any(hint in line for hint in ("set MODEL__", "MODEL__NAME=", "download ", "choose a"))
    return line


def request(
    name: str,
    prompt: Sequence[int] = PROMPT,
    max_tokens: int = 8,
    sampling: SamplingParams = GREEDY,
    *,
    logprobs: bool = False,
) -> GenerationRequest:
    """A request with defaults."""
    return GenerationRequest(
        id=name,
        prompt_token_ids=list(prompt),
        max_tokens=max_tokens,
        sampling=sampling,
        logprobs=logprobs,
    )


def run(backend: Backend, *requests: GenerationRequest) -> dict[str, list[TokenEvent]]:
    """Run requests together until they end, and return the events of each."""
    events: dict[str, list[TokenEvent]] = {r.id: [] for r in requests}
    for r in requests:
        backend.add(r)
    steps = 0
    while backend.has_work():
        for event in backend.step():
            events[event.request_id].append(event)
        steps += 1
        assert steps < 10_000, "the requests do not end"
    return events


def tokens(events: Sequence[TokenEvent]) -> list[int]:
    """All tokens of one request."""
    return [token for event in events for token in event.token_ids]


def logprobs(events: Sequence[TokenEvent]) -> list[float]:
    """All log-probabilities of one request."""
    return [value for event in events for value in event.logprobs]
