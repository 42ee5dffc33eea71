"""Which precision the weights get on a CPU, and models that do not fit into memory."""

import itertools
import logging
import re
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from app.core.config import ModelSettings
from app.llm.engine.transformers import integer_linear, weights
from app.llm.engine.transformers.backend import TransformersBackend
from app.llm.engine.transformers.integer_linear import IntegerLinear
from app.llm.engine.transformers.loading import load_pipeline
from app.llm.loader import load_backend
from app.llm.models import progress
from app.llm.models.description import read_gguf
from app.llm.models.snapshot import Snapshot
from app.utils.errors import ModelLoadError
from tests.support.backends import PROMPT, load, request, run, tokens
from tests.support.tiny_gguf import make_tiny_gguf
from tests.support.tiny_model import make_tiny_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model whose layers count as large."""
    for module in (integer_linear, weights):
        monkeypatch.setattr(module, "WORTH_QUANTIZING", 1)
    return make_tiny_model(tmp_path / "model")


def settings(model: Path, quantization: str = "auto") -> ModelSettings:
    """The settings of a local model for transformers."""
    fields = {"source": "local", "name": str(model), "engine": "transformers"}
    return ModelSettings.model_validate(fields | {"quantization": quantization})


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_safetensors_become_integers_while_they_are_read(model: Path, quantization: str) -> None:
    """The same layers hold the same integers as those of a model that was loaded whole."""
    bits = int(quantization[-1])
    snapshot = Snapshot(model, None)
    read = load_pipeline(settings(model), snapshot, None, bits).model
    whole = load_pipeline(settings(model), snapshot, None).model
    integer_linear.quantize_linears(read, bits)
    integer_linear.quantize_linears(whole, bits)
    names = [name for name, m in read.named_modules() if isinstance(m, IntegerLinear)]
    assert names == [name for name, m in whole.named_modules() if isinstance(m, IntegerLinear)]
    assert len(names) > 4
    row = torch.tensor([PROMPT])
    with torch.inference_mode():
        assert torch.equal(read(row).logits, whole(row).logits)


@pytest.mark.parametrize("packed", [None, GGMLQuantizationType.Q8_0], ids=["f16", "q8_0"])
def test_gguf_weights_become_integers_one_by_one(
    model: Path, packed: GGMLQuantizationType | None
) -> None:
    """The same layers hold the same integers as those of a file that was unpacked whole."""
    path = make_tiny_gguf(model / "tiny.gguf", packed=packed)
    snapshot = Snapshot(model, path.name)
    header = read_gguf(settings(path), snapshot)
    read = load_pipeline(settings(path), snapshot, header, 8).model
    assert [m for m in read.modules() if type(m) is torch.nn.Linear] == []
    whole = load_pipeline(settings(path).model_copy(update={"dtype": "bfloat16"}), snapshot, header)
    for loaded in (read, whole.model):
        integer_linear.quantize_linears(loaded, 8)
    row = torch.tensor([PROMPT])
    with torch.inference_mode():
        assert torch.equal(read(row).logits, whole.model(row).logits)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_model_in_integers_answers(model: Path, quantization: str) -> None:
    """The service's description names the integers, and the start check has passed."""
    backend = load(settings(model, quantization))
    assert backend.info.dtype == quantization
    assert "each request has a cache of its own" not in backend.info.backend_reason
    assert len(tokens(run(backend, request("a", PROMPT, 4))["a"])) == 4


@pytest.mark.parametrize("form", ["float32", "int8", "gguf"])
def test_loading_tells_how_many_tensors_are_read(
    model: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Each form of weights is told tensor by tensor, up to all of them."""
    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0)
    asked = settings(model, form if form == "int8" else "auto")
    if form == "gguf":
        asked = settings(make_tiny_gguf(model / "tiny.gguf"))
    told: list[tuple[str, int]] = []
    load_backend(
        asked,
        max_running=2,
        echo_step_seconds=0,
        token=None,
        progress=lambda text, percent=None: told.append((text, percent)) if percent else None,
    )
    texts, percents = zip(*told, strict=True)
    assert percents == tuple(sorted(percents))
    assert percents[-1] == 100
    tensors = re.fullmatch(
        rf"loading {asked.label} with transformers: 100 % of (\d+) tensors", texts[-1]
    )
    assert tensors is not None
    assert len(told) == int(tensors[1])


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16])
def test_only_the_embedding_and_the_cache_have_16_bits(
    model: Path, monkeypatch: pytest.MonkeyPatch, quantization: str, cache: torch.dtype
) -> None:
    """The rest is computed in float32, and the logits stay those of integers in bfloat16.

    Without bfloat16 instructions the cache is in float32, too.
    """
    found = {"avx512_bf16": cache == torch.bfloat16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    bits, snapshot = int(quantization[-1]), Snapshot(model, None)
    half, full = (load_pipeline(settings(model), snapshot, None, bits).model for _ in range(2))
    for loaded in (half, full):
        integer_linear.quantize_linears(loaded, bits)
    integer_linear.compute_in_float32(full, cache)
    embedding = full.get_input_embeddings().weight
    assert (embedding.dtype, full.dtype) == (torch.bfloat16, cache)
    assert {p.dtype for p in full.parameters() if p is not embedding} == {torch.float32}
    row = torch.tensor([PROMPT])
    with torch.inference_mode():
        expected, logits = half(row).logits, full(row).logits
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    loaded = load(settings(model, quantization))
    assert isinstance(loaded, TransformersBackend)
    assert loaded.info.dtype == quantization
    assert len(tokens(run(loaded, request("a", PROMPT, 2))["a"])) == 2


def test_a_model_in_integers_reads_prompts_in_smaller_pieces(model: Path) -> None:
    """A prompt of 120 tokens takes two steps, because streams beside it wait for each."""
    steps = []
    for quantization in ("none", "int8"):
        backend = load(settings(model, quantization))
        backend.add(request("a", PROMPT * 24, 1))
        steps.append(0)
        while backend.has_work():
            backend.step()
            steps[-1] += 1
    assert steps[1] == steps[0] + 1


def test_auto_takes_8_bits_for_large_models(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A small model keeps its dtype, a large one gets int8, and the description says why."""
    small = load(settings(model)).info
    assert (
        small.dtype == str(torch.get_default_dtype()).removeprefix("torch.") or "16" in small.dtype
    )
    assert small.backend_reason == "model.engine is transformers"
    monkeypatch.setattr(weights, "LARGE", 1)
    with caplog.at_level(logging.INFO, logger="llm_service"):
        large = load(settings(model)).info
    assert large.dtype == "int8"
    assert "weights are int8, since it has" in large.backend_reason
    assert "weights are int8, since it has" in caplog.text


def bits_by_memory(
    model: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> list[int | str]:
    """What is chosen, or the line of the refusal, with more and more memory."""
    found: list[int | str] = []
    for free in range(100_000, 800_000, 25_000):
        monkeypatch.setattr(weights, "available_memory", lambda free=free: free)
        try:
            choice = weights.choose_weights_precision(
                *(settings(model, quantization), Snapshot(model, None), None),
                max_running=1,
                weight_bytes=4,
            )
        except ModelLoadError as error:
            found.append(str(error))
        else:
            found.append(choice.bits)
    return found


def test_auto_takes_what_fits(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more memory a model is refused, gets int4, int8, and then its own precision."""
    found = bits_by_memory(model, monkeypatch, "auto")
    assert "GB for its weights in int4 and " in str(found[0])
    kinds = [kind for kind, _ in itertools.groupby(found) if isinstance(kind, int)]
    assert kinds == [4, 8, 0]


def test_layers_that_stay_in_float32_count(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of small layers needs more memory in int4 than one of large layers."""
    large = bits_by_memory(model, monkeypatch, "int4")
    monkeypatch.setattr(weights, "WORTH_QUANTIZING", 1 << 20)
    small = bits_by_memory(model, monkeypatch, "int4")
    assert large.index(4) < small.index(4)


def test_a_refusal_names_the_setting_that_helps(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A precision that was asked for and does not fit is refused; one that fits is named."""
    found = bits_by_memory(model, monkeypatch, "none")
    assert found[-1] == 0
    lines = [line for line in found if isinstance(line, str)]
    assert "are free: raise the memory limit, or" in lines[0]
    assert any("are free: set MODEL__QUANTIZATION=int4, raise" in line for line in lines)
    assert "are free: set MODEL__QUANTIZATION=int8, raise" in lines[-1]


def test_integers_are_refused_on_a_gpu() -> None:
    """CUDA gives a line that says what to do."""
    with pytest.raises(ModelLoadError, match="only a CPU runs: set MODEL__QUANTIZATION=auto"):
        load(ModelSettings(device="cuda", quantization="int8", engine="transformers"))
