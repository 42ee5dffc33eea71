"""Whole files that cannot be served as they are: adapters, quantized and strange weights."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from tests.support import backends
from tests.support.backends import load_local, request, run, tokens
from tests.support.tiny_model import tiny_weights

refusal = partial(backends.refusal, engine="transformers")


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that tests may break."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def configure(model: Path, **changes: Any) -> None:
    """Change members of a model's configuration."""
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(model: Path, **changes: np.ndarray) -> None:
    """Write a model's weights with changes."""
    path = model / "model.safetensors"
    save_file(tiny_weights() | changes, path, metadata={"format": "pt"})


@pytest.mark.parametrize("engine", ["auto", "transformers"])
@pytest.mark.parametrize("whole", [True, False], ids=["beside", "alone"])
def test_an_adapter_is_refused_by_name(model: Path, engine: str, *, whole: bool) -> None:
    """An adapter, alone or beside a whole model, is refused with its base and how to merge it."""
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    if whole:
        rewrite(model)
    else:
        (model / "config.json").unlink()
    line = refusal(model, engine=engine)
    assert line.startswith(f"{model} holds a LORA adapter of owner/base, and adapters are not ")
    assert "peft's merge_and_unload() and set MODEL__NAME to the merged model" in line
    assert line.endswith("delete adapter_config.json to serve the model without it") == whole


@pytest.mark.parametrize(
    ("quantization", "why"),
    [
        ({"quant_method": "awq", "bits": 4}, "requires gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "requires bitsandbytes"),
        ({"quant_method": "exl2", "bits": 4}, "transformers does not know this format"),
        ({"quant_method": "nvfp4"}, "not supported yet"),
    ],
    ids=["awq", "bitsandbytes", "exl2", "nvfp4"],
)
def test_a_quantization_that_cannot_run_here(
    model: Path, quantization: dict[str, Any], why: str
) -> None:
    """The error names the format and the true reason, and does not send for the files again."""
    configure(model, quantization_config=quantization)
    line = refusal(model)
    assert line.startswith(f"{model} is quantized with {quantization['quant_method']}, which ")
    assert why in line
    assert "install what it needs, or choose a repository with its unquantized weights" in line
    assert "download" not in line


def test_a_quantization_that_needs_a_gpu(model: Path) -> None:
    """The error of a format that only a GPU runs names the setting."""
    configure(model, quantization_config={"quant_method": "fbgemm_fp8"})
    assert "requires a GPU or XPU): set MODEL__DEVICE=cuda where there is one" in refusal(model)


def test_fp8_weights_run_on_a_cpu(model: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Weights in FP8 with a scale answer as the same weights in float32."""
    plain = shutil.copytree(tiny_model_dir, tmp_path / "plain")
    packed: dict[str, torch.Tensor] = {}
    same: dict[str, torch.Tensor] = {}
    for name, weight in tiny_weights().items():
        same[name] = packed[name] = torch.from_numpy(weight.copy())
        if "_proj" in name:
            packed[name] = (torch.from_numpy(weight) * 8).to(torch.float8_e4m3fn)
            packed[f"{name}_scale_inv"] = torch.full((1, 1), 1 / 8)
            same[name] = packed[name].float() / 8
    save_torch_file(packed, model / "model.safetensors", metadata={"format": "pt"})
    save_torch_file(same, plain / "model.safetensors", metadata={"format": "pt"})
    configure(
        model,
        quantization_config={
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
    )
    first, second = (
        tokens(run(load_local(path, engine="transformers"), request("r"))["r"])
        for path in (model, plain)
    )
    assert first == second


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(model: Path, value: float) -> None:
    """One NaN or infinity in a tensor is an error that names the tensor."""
    name = "model.layers.1.mlp.up_proj.weight"
    weight = tiny_weights()[name]
    weight[3, 4] = value
    rewrite(model, **{name: weight})
    assert f"its tensor {name} has infinite values, or NaN, in torch.float32" in refusal(model)


def test_tensors_that_the_configuration_does_not_name(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Tensors that are ignored are told in a warning."""
    rewrite(model, **{"model.layers.0.extra.weight": np.ones(4, dtype=np.float32)})
    with caplog.at_level(logging.WARNING, logger="llm_service"):
        load_local(model, engine="transformers")
    said = f"tensors of {model} that its configuration does not name are ignored: 1, such as "
    assert f"{said}model.layers.0.extra.weight" in caplog.text


def test_a_shape_that_does_not_fit(model: Path) -> None:
    """The error of a tensor with another shape names the tensor."""
    rewrite(model, **{"lm_head.weight": tiny_weights()["lm_head.weight"][:10]})
    line = refusal(model)
    assert "its tensor lm_head.weight is [10, 64], and its configuration says [266, 64]" in line
    assert "download it again" not in line


def test_a_failure_of_the_engine_does_not_blame_the_files(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose first step fails is refused as whole."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no such attention")

    monkeypatch.setattr("app.llm.engine.transformers.backend.plan_step", fails)
    assert refusal(model) == (
        f"{model} is whole, but cannot be loaded (no such attention): choose another model"
    )
