"""GGUF files as people have them: what the header says is honoured, or the file is refused."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from app.core.config import ModelSettings
from app.llm.engine.openvino.gguf import why_not_read
from app.llm.models.description import read_tokenizer
from app.llm.models.gguf_header import read_header
from app.llm.models.snapshot import Snapshot
from app.llm.protocol import Backend, GenerationRequest, RegexGrammar
from tests.support import tiny_model
from tests.support.backends import GREEDY, load_local, refusal, request, run, tokens
from tests.support.tiny_gguf import gguf_name, in_gguf_order, make_tiny_gguf

pytestmark = pytest.mark.usefixtures("tokenizer_here")

HEAD = tiny_model.HIDDEN // tiny_model.HEADS
# Long enough for scaled positions to change what follows.
PROMPT = [3 + i % 250 for i in range(120)]
FIRST = 57
"""The first token of the tiny model's greedy answer to tests.support.backends.PROMPT."""


def answer(backend: Backend, length: int = 120) -> list[int]:
    """Eight greedy tokens after a prompt."""
    return tokens(run(backend, request("r", PROMPT[:length]))["r"])


# --- The header says what transformers' configuration says ----------------------------------------


def llama3_divisors(factor: float, low: float, high: float, original: int) -> np.ndarray:
    """What llama.cpp's converter writes into ``rope_freqs.weight`` for Llama 3.1."""
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(0, HEAD, 2) / HEAD)
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    divisors = np.where(wavelengths > original / low, factor, between)
    return np.where(wavelengths < original / high, 1.0, divisors)


def biases() -> dict[str, np.ndarray]:
    """Biases of all linear layers, by the names that transformers gives them."""
    random = np.random.default_rng(2)
    return {
        name.replace(".weight", ".bias"): random.normal(0, 1, len(weight)).astype(np.float32)
        for name, weight in tiny_model.tiny_weights().items()
        if "_proj" in name
    }


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT, LONG = np.linspace(1, 4, HEAD // 2), np.linspace(2, 9, HEAD // 2)


@dataclass(frozen=True)
class Case:
    """A GGUF file and the model of transformers that it was converted from."""

    ignored: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    context: int = tiny_model.CONTEXT_LENGTH


CASES = {
    "llama3": Case(
        "rope_freqs.weight",
        tensors={"rope_freqs.weight": llama3_divisors(8, 1, 4, 64)},
        config={
            "rope_scaling": {
                "rope_type": "llama3",
                "original_max_position_embeddings": 64,
                **LLAMA3,
            }
        },
    ),
    "long and short": Case(
        "rope_factors_long.weight",
        keys={
            "llama.rope.scaling.original_context_length": 256,
            "llama.rope.scaling.attn_factor": 1.25,
        },
        tensors={"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT},
        config={
            "rope_scaling": {
                "rope_type": "longrope",
                "long_factor": LONG.tolist(),
                "short_factor": SHORT.tolist(),
                "attention_factor": 1.25,
                "original_max_position_embeddings": 256,
            }
        },
        context=256,
    ),
    "linear": Case(
        "llama.rope.scaling.factor",
        keys={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        config={"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "yarn": Case(
        "llama.rope.scaling.factor",
        keys={
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 128,
        },
        config={
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "biases": Case(
        "blk.0.attn_q.bias",
        tensors={gguf_name(n): in_gguf_order(n, bias) for n, bias in biases().items()},
        config={"attention_bias": True, "mlp_bias": True},
        weights=biases(),
    ),
    "window": Case(
        "llama.attention.sliding_window",
        keys={"llama.attention.sliding_window": 128},
        context=128,
    ),
}


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path) -> list[int]:
    """The answer of the tiny model itself."""
    return answer(load_local(tiny_model_dir))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_openvino_ignores_is_honoured_by_transformers(
    case: Case, tiny_model_dir: Path, tmp_path: Path, plain: list[int]
) -> None:
    """The greedy tokens are those of the model that was converted, and the reason is told."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "folder")
    (folder / "config.json").write_text(json.dumps(tiny_model.CONFIG | dict(case.config)))
    weights = tiny_model.tiny_weights() | dict(case.weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = make_tiny_gguf(tmp_path / "tiny.gguf", keys=case.keys, tensors=case.tensors)
    backend = load_local(path)
    info = backend.info
    assert info.backend == "transformers"
    assert info.backend_reason == (
        f"model.engine is auto, but OpenVINO cannot run {path}: its reader ignores {case.ignored}"
    )
    assert info.context_length == case.context
    assert answer(backend) == answer(load_local(folder))
    assert (answer(backend) == plain) == (case.context == 128)


@pytest.mark.parametrize(
    ("keys", "tensors", "named"),
    [
        (
            {"llama.rope.scaling.type": "other", "llama.rope.scaling.factor": 4.0},
            {},
            "llama.rope.scaling.type is other",
        ),
        (
            {"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.alpha": 2.0},
            {},
            "llama.rope.scaling.alpha is 2.0",
        ),
        ({}, {"blk.1.attn_sinks.weight": np.ones(4)}, "blk.1.attn_sinks.weight"),
        ({}, {"blk.1.attn_q_norm.weight": np.ones(HEAD)}, "blk.1.attn_q_norm.weight"),
        ({}, {"rope_freqs.weight": np.ones(3)}, "rope_freqs.weight"),
        ({"split.count": 2}, {}, "it is one of 2 parts, which llama-gguf-split --merge joins"),
    ],
    ids=["scaling", "scaling key", "tensor", "norm", "frequencies", "part"],
)
def test_what_no_engine_honours_is_refused(
    tmp_path: Path, keys: dict[str, Any], tensors: dict[str, np.ndarray], named: str
) -> None:
    """The line names the key or the tensor that would be ignored."""
    path = make_tiny_gguf(tmp_path / "tiny.gguf", keys=keys, tensors=tensors)
    assert named in refusal(path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.1.ffn_up.weight", (64, 64)),
        ("blk.1.attn_q.weight", (32, 64)),
        ("blk.1.attn_norm.weight", (32,)),
        ("output.weight", (100, 64)),
        ("token_embd.weight", (100, 64)),
    ],
)
def test_shapes_that_do_not_fit(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    """A tensor of another shape than the header's sizes give is no model for OpenVINO."""
    path = make_tiny_gguf(tmp_path / "tiny.gguf", tensors={name: np.ones(shape)})
    assert " has the shape (" in str(why_not_read(read_header(path)))


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """The line names the tensor, its shape and the one that is needed."""
    wrong = {"blk.1.ffn_up.weight": np.ones((64, 64))}
    path = make_tiny_gguf(tmp_path / "tiny.gguf", tensors=wrong)
    said = "model.layers.1.mlp.up_proj.weight is [64, 64], and its configuration says [128, 64]"
    assert said in refusal(path)


@pytest.mark.parametrize("engine", ["openvino", "transformers"])
def test_weights_that_are_no_numbers(tmp_path: Path, engine: str) -> None:
    """The weights are refused, or what they compute, before the model is ready."""
    broken = np.full((128, 64), 0.1)
    broken[0, 0] = np.nan
    path = make_tiny_gguf(tmp_path / "tiny.gguf", tensors={"blk.1.ffn_up.weight": broken})
    line = refusal(path, engine=engine)
    assert line.startswith(str(path))
    assert "NaN" in line


# --- End tokens -----------------------------------------------------------------------------------


def test_every_end_token_of_the_header_ends_an_answer(tmp_path: Path) -> None:
    """Both engines end an answer at a token that the header names beside the end of sequence."""
    path = make_tiny_gguf(tmp_path / "tiny.gguf", keys={"tokenizer.ggml.eot_token_id": FIRST})
    events = run(load_local(path, engine="transformers"), request("r"))["r"]
    assert tokens(events) == [FIRST]
    assert events[-1].finish_reason == "stop"
    # OpenVINO is given what the tokenizer's process reads.
    settings = ModelSettings(source="local", name=str(path))
    assert FIRST in read_tokenizer(settings, Snapshot(tmp_path, path.name)).eos_token_ids


def test_every_end_token_of_a_folder_ends_an_answer(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The generation config, or else the configuration, lists the tokens for both engines."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "folder")
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, FIRST]}))
        settings = ModelSettings(source="local", name=str(folder))
        assert read_tokenizer(settings, Snapshot(folder, None)).eos_token_ids == {2, FIRST}
        assert tokens(run(load_local(folder), request("r"))["r"]) == [FIRST]
        (folder / "generation_config.json").unlink(missing_ok=True)


# --- SentencePiece --------------------------------------------------------------------------------


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    """The tiny model with a SentencePiece vocabulary without merges."""
    return make_tiny_gguf(tmp_path / "pieces.gguf", sentencepiece=True)


def test_pieces_without_merges_run_on_both_engines(pieces: Path) -> None:
    """Both engines give the same tokens and tokenizer, and OpenVINO keeps to a grammar."""
    backend, reference = load_local(pieces), load_local(pieces, engine="transformers")
    assert backend.info.backend == "openvino"
    assert answer(backend) == answer(reference)
    assert backend.info.tokenizer_json == reference.info.tokenizer_json
    constrained = GenerationRequest(
        id="g",
        prompt_token_ids=PROMPT,
        max_tokens=20,
        sampling=GREEDY,
        grammar=RegexGrammar(pattern="(the ?){2}"),
    )
    ids = tokens(run(backend, constrained)["g"])
    assert Tokenizer.from_str(backend.info.tokenizer_json).decode(ids).strip() in (
        "the the",
        "thethe",
    )


def test_any_exception_of_openvino_falls_back(
    pieces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An IndexError of OpenVINO's own tokenizer, which needs merges, does not end the start."""
    monkeypatch.setattr("app.llm.engine.openvino.loading.gguf_vocabulary", lambda _: None)
    info = load_local(pieces).info
    assert info.backend == "transformers"
    assert f"OpenVINO cannot run {pieces}: " in info.backend_reason


# --- Names ----------------------------------------------------------------------------------------


def test_the_ending_may_be_in_capitals(tmp_path: Path) -> None:
    """A folder with a file whose name ends in .GGUF is served."""
    make_tiny_gguf(tmp_path / "TINY.GGUF")
    assert load_local(tmp_path, engine="openvino").info.backend == "openvino"


def test_a_file_in_parts(tmp_path: Path) -> None:
    """The line for a part says how to join the parts, and a whole file beside them is proposed."""
    part = make_tiny_gguf(tmp_path / "tiny-00001-of-00002.gguf")
    for name in (part, tmp_path):
        line = refusal(name)
        assert "has a GGUF file in parts, tiny-00001-of-00002.gguf for one" in line
        assert "llama-gguf-split --merge" in line
    shutil.copy(part, tmp_path / "whole.gguf")
    assert refusal(tmp_path).endswith(f"as in MODEL__NAME={tmp_path / 'whole.gguf'}")


def test_a_models_folder_in_the_hubs_cache(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The snapshot of the main branch is taken, or the only one; of several one must be named."""
    root = tmp_path / "models--owner--name"
    shutil.copytree(tiny_model_dir, root / "snapshots" / "abc")
    assert load_local(root).info.backend == "transformers"
    (root / "snapshots" / "def").mkdir()
    assert refusal(root).endswith(f"set MODEL__NAME to a folder in {root / 'snapshots'}")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    assert load_local(root).info.backend == "transformers"


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_safetensors_in_another_layout(tiny_model_dir: Path, tmp_path: Path, name: str) -> None:
    """The line names the file and the layout that is needed."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "folder")
    (folder / "model.safetensors").rename(folder / name)
    assert refusal(folder).startswith(f"{folder} has {name}, but no model.safetensors: choose a ")


def test_a_sentencepiece_model_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The line for tokenizer.model without tokenizer.json says what makes one of the other."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "folder")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    assert "save_pretrained of transformers makes of tokenizer.model" in refusal(folder)


# --- Starts ---------------------------------------------------------------------------------------


def test_the_file_is_read_by_our_header_reader_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader that takes strings one by one is not called, and the header is read once."""

    def never(*_: object) -> None:
        raise AssertionError("the file was read by gguf")

    read: list[Path] = []

    def counted(path: Path) -> Any:
        read.append(path)
        return read_header(path)

    path = make_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(gguf.GGUFReader, "__init__", never)
    monkeypatch.setattr("transformers.integrations.gguf.reader._read_metadata", never)
    monkeypatch.setattr("app.llm.models.description.read_header", counted)
    load_local(path, engine="transformers")
    assert read == [path]
