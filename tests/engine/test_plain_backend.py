"""The plain backend, and the check that chooses between it and the paged one.

test_conformance.py has what it shares with the other backends.
"""

import logging
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from app.llm.engine.transformers import paged_attention
from app.llm.engine.transformers.backend import TransformersBackend
from app.llm.engine.transformers.caching_model import Cache, CachingModel
from app.llm.engine.transformers.plain import PlainBackend
from app.llm.protocol import Backend, RegexGrammar
from tests.support import backends
from tests.support.backends import change_config, load_local, request, run, tokens
from tests.support.tiny_model import CONFIG, CONTEXT_LENGTH, VOCABULARY

load = partial(load_local, engine="transformers")
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": 0.3,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "state_size": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
NO_PAGES = "its attention does not support a paged cache"
LONG = [10 + i * 7 % 180 for i in range(60)]
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 24}
LONGROPE = ROPE | {
    "rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4
}  # fmt: skip


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny model that tests may change, and no records of models that passed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def of_kind(model: Path, kind: str, **config: Any) -> Any:
    """Put random weights of another architecture into a tiny model's folder; returns the model."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | config)).eval()
    made.save_pretrained(model)
    (model / "generation_config.json").unlink(missing_ok=True)
    return made


def generate(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of the library's own generation."""
    model.generation_config = GenerationConfig(pad_token_id=0)
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return list(output[0, len(prompt) :].tolist())


class Passes:
    """Counts the forward passes of a loaded backend by their shape."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, ...]] = []
        forward = CachingModel.forward

        def counted(
            caching: CachingModel, ids: Tensor, count: int, cache: Cache
        ) -> tuple[Tensor, Cache]:
            self.shapes.append((ids.shape[0], count))
            return forward(caching, ids, count, cache)

        monkeypatch.setattr(CachingModel, "forward", counted)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """The forward passes from now on."""
    return Passes(monkeypatch)


# --- Right answers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "why", "config"),
    [
        ("gptj", NO_PAGES, {"rotary_dim": 4}),
        ("mamba", NO_PAGES, {}),
        (
            "lfm2",
            "the paged cache cannot run it",
            {"layer_types": ["conv", "full_attention"]},
        ),
        (
            "phi3",
            "its rotary embedding depends on the longest text of a batch",
            {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_answers_are_those_of_generate(
    model: Path, kind: str, why: str, config: dict[str, Any]
) -> None:
    """A model that pages cannot serve gives the library's tokens, and /status says why."""
    made = of_kind(model, kind, **config)
    prompts = {"a": LONG[:9], "b": LONG[9:18], "c": LONG, "d": LONG[:22]}
    limits = {"a": 6, "b": 2, "c": 4, "d": 6}
    expected = {name: generate(made, prompt, limits[name]) for name, prompt in prompts.items()}
    backend = load(model)
    assert backend.info.backend_reason == (
        f"model.engine is transformers; each request has a cache of its own, since {why}"
    )
    asked = [request(name, prompt, limits[name]) for name, prompt in prompts.items()]
    alone = {r.id: cut(tokens(run(backend, r)[r.id]), expected[r.id]) for r in asked}
    assert alone == expected
    together = run(backend, *asked)
    assert {n: cut(tokens(e), expected[n]) for n, e in together.items()} == expected


def cut(given: list[int], expected: list[int]) -> list[int]:
    """An answer with the tokens that ``generate`` has after an end-of-sequence token."""
    return given + expected[len(given) :]


def test_a_dynamic_rope_is_that_of_a_short_text_within_the_context(model: Path) -> None:
    """Up to the context length the kind ``dynamic`` changes nothing, so the paged path may run."""
    filling = request("r", [10 + i * 7 % 200 for i in range(60)], 4)
    change_config(model, max_position_embeddings=64)
    expected = tokens(run(load(model), filling)["r"])
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": CONFIG["rope_theta"]}
    change_config(model, rope_parameters=rope)
    backend = load(model)
    assert isinstance(backend, TransformersBackend)
    assert tokens(run(backend, filling)["r"]) == expected


# --- Sharing --------------------------------------------------------------------------------------


@pytest.fixture
def plain(tiny_model_dir: Path) -> Backend:
    """The plain backend with the tiny model."""
    return backends.load(backends.settings_of("transformers-plain", tiny_model_dir), max_running=4)


def test_requests_of_one_length_share_forward_passes(plain: Backend, passes: Passes) -> None:
    """Four prompts of one length are read and continued in one pass for all."""
    answers = run(plain, *(request(f"r{i}", [10 + i] * 5, 3) for i in range(4)))
    assert {len(tokens(events)) for events in answers.values()} == {3}
    assert passes.shapes == [(4, 5), (4, 1), (4, 1)]


def test_a_cancelled_request_leaves_its_group(plain: Backend, passes: Passes) -> None:
    """After a cancellation the others of its group go on with their own answers."""
    asked = [request(f"r{i}", [10 + i * 3] * 5, 6) for i in range(3)]
    expected = {r.id: tokens(run(plain, r)[r.id]) for r in asked}
    passes.shapes.clear()
    for r in asked:
        plain.add(r)
    events = plain.step()
    plain.cancel("r1")
    while plain.has_work():
        events += plain.step()
    for name in ("r0", "r2"):
        assert tokens([e for e in events if e.request_id == name]) == expected[name]
    assert Counter(passes.shapes) == {(3, 5): 1, (2, 1): 5}


def test_a_session_goes_on_with_its_cache(plain: Backend, passes: Passes) -> None:
    """Of a prompt that begins with an earlier prompt and answer only the new tokens are read."""
    first = tokens(run(plain, request("a", LONG, 8))["a"])
    passes.shapes.clear()
    following = run(plain, request("b", [*LONG, *first, 20, 21], 1))["b"]
    # The last token of the answer had not been read.
    assert passes.shapes == [(1, 3)]
    assert following[0].cached_tokens == len(LONG) + len(first) - 1


def test_long_prompts_are_read_in_pieces(plain: Backend, passes: Passes) -> None:
    """A request that is being answered gets a token for each piece of another's prompt."""
    plain.add(request("short", LONG[:5], 8))
    plain.step()
    plain.add(request("long", [10 + i % 200 for i in range(400)], 1))
    for _ in range(2):
        assert "short" in {event.request_id for event in plain.step()}
    assert passes.shapes == [(1, 5), (1, 1), (1, 256), (1, 1), (1, 144)]
    while plain.has_work():
        plain.step()


def test_grammars_hold(plain: Backend) -> None:
    """An answer follows its grammar, and another one of the same group does not."""
    digits = request("digits", LONG[:5], 4)
    fields = {name: getattr(digits, name) for name in digits.__struct_fields__}
    digits = type(digits)(**fields | {"grammar": RegexGrammar("1234567")})
    answers = run(plain, digits, request("free", LONG[5:10], 4))
    # The tiny model's tokens are bytes, in the order of the byte-level alphabet.
    assert len(tokens(answers["digits"])) == 4
    assert sorted(tokens(answers["digits"])) == tokens(answers["digits"])
    assert tokens(answers["free"]) == tokens(run(plain, request("free", LONG[5:10], 4))["free"])


# --- The choice -----------------------------------------------------------------------------------


def test_an_encoder_is_refused(model: Path) -> None:
    """A model whose tokens see later ones gets one line and answers nothing."""
    of_kind(model, "bert")
    assert backends.refusal(model, engine="transformers") == (
        f"{model} is of a kind that transformers cannot serve (its tokens see later ones, which "
        "text generation does not support): choose another model"
    )


def break_paged_attention(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the paged attention the mean of the values; returns a list that grows with its calls."""
    calls: list[int] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        calls.append(key.shape[1])
        mean = value.mean(1).repeat_interleave(query.shape[0] // value.shape[0], dim=0)
        return mean.expand(query.shape[1], -1, -1)

    monkeypatch.setattr(paged_attention, "attend", attend)
    return calls


def test_a_wrong_paged_path_is_not_used(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The plain path runs if the paged one gives other tokens; what has passed is not checked."""
    assert isinstance(load(model), TransformersBackend)
    calls = break_paged_attention(monkeypatch)
    assert isinstance(load(model), TransformersBackend)
    change_config(model, rms_norm_eps=1e-6)
    with caplog.at_level(logging.WARNING, logger="llm_service"):
        backend = load(model)
    assert calls
    assert isinstance(backend, PlainBackend)
    assert backend.info.backend_reason.endswith("gives other tokens than model.generate")
    assert "each request gets a cache of its own" in caplog.text


def test_records_that_cannot_be_written(model: Path) -> None:
    """Without a place for the record a model is served, and checked at each start."""
    (model.parent / "home").write_text("no folder")
    assert isinstance(load(model), TransformersBackend)
