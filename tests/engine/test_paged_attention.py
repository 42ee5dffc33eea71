"""Attention over a paged cache equals a plain reference implementation."""

import logging
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from app.core.config import ModelSettings
from app.llm.engine.transformers import backend as transformers_backend
from app.llm.engine.transformers.attention_choice import PAGE_SIZE
from app.llm.engine.transformers.paged_attention import NAME, PLANS, StepPlans, attend, make_plan
from tests.support.backends import load, refusal, request, run, tokens

HEAD = 8
NOTHING_CACHED = torch.empty(0, dtype=torch.int64)


def naive(
    query: Tensor, key: Tensor, value: Tensor, *, window: int | None, softcap: float | None
) -> Tensor:
    """One request in double precision, [queries, heads, size]; the queries are the last keys."""
    heads, queries, size = query.shape
    keys = key.shape[1]
    shared = heads // key.shape[0]
    output = torch.empty(queries, heads, value.shape[-1], dtype=torch.float64)
    for head in range(heads):
        for i in range(queries):
            last = keys - queries + i
            first = 0 if window is None else max(0, last - window + 1)
            seen = slice(first, last + 1)
            scores = key[head // shared, seen].double() @ query[head, i].double() / size**0.5
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            output[i, head] = torch.softmax(scores, 0) @ value[head // shared, seen].double()
    return output


def case(
    lengths: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    window: int | None = None,
    softcap: float | None = None,
    shared_prefix: int = 0,
) -> tuple[Tensor, Tensor]:
    """Run requests of (new, all) tokens on a shuffled cache; the result and the expected one."""
    torch.manual_seed(len(lengths))
    pool = 2 * sum(keys for _, keys in lengths) + 1
    cached_keys, cached_values = torch.randn(2, heads[1], pool, HEAD)
    free = torch.randperm(pool)
    prefix, free = free[:shared_prefix], free[shared_prefix:]
    places = []
    for _, keys in lengths:
        own, free = free[: keys - shared_prefix], free[keys - shared_prefix :]
        places.append(torch.cat([prefix, own]))
    queries = torch.randn(heads[0], sum(new for new, _ in lengths), HEAD)
    plan = make_plan(
        [new for new, _ in lengths],
        [keys for _, keys in lengths],
        torch.cat(places),
        dtype=torch.float32,
        window=window,
    )
    got = attend(
        queries,
        cached_keys[:, plan.read_index],
        cached_values[:, plan.read_index],
        plan,
        softcap=softcap,
    )
    start, expected = 0, []
    for (new, _), place in zip(lengths, places, strict=True):
        expected.append(
            naive(
                queries[:, start : start + new],
                cached_keys[:, place],
                cached_values[:, place],
                window=window,
                softcap=softcap,
            )
        )
        start += new
    return got.double(), torch.cat(expected)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_ragged_batches_of_decodes_prompts_and_chunks(
    heads: tuple[int, int], softcap: float | None
) -> None:
    """Random mixtures with grouped-query heads and capped scores equal the reference."""
    random.seed(repr((heads, softcap)))
    for _ in range(8):
        lengths = []
        for _ in range(random.randint(1, 9)):
            keys = random.randint(1, 60)
            lengths.append((random.choice([1, 1, 1, keys, random.randint(1, keys)]), keys))
        got, expected = case(lengths, heads=heads, softcap=softcap)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_very_different_lengths_are_not_padded() -> None:
    """A very long request among short ones is computed alone."""
    lengths = [(1, 700), (1, 3), (1, 1), (1, 650), (1, 40), (5, 300)]
    got, expected = case(lengths)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    plan = make_plan(
        [1, 1, 1, 1], [700, 3, 40, 650], torch.zeros(1393, dtype=torch.int64), dtype=torch.float32
    )
    assert sorted(piece.keys for piece in plan.pieces) == [40, 700]


def test_requests_that_share_a_prefix() -> None:
    """Requests that read the same pages get the same result as alone."""
    got, expected = case([(1, 40), (1, 33), (9, 45), (1, 60)], shared_prefix=32)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [4, 16])
def test_a_sliding_window_is_masked(window: int) -> None:
    """Prompts longer than the window, and chunks on both sides of its edge, equal the reference."""
    lengths = [(1, 3), (1, window), (12, 12), (5, 5 + window - 1), (20, 20), (3, 4)]
    got, expected = case(lengths, window=window)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_new_prompts_read_nothing_back() -> None:
    """If nothing is cached, the new keys are used without reading the cache."""
    torch.manual_seed(0)
    query, key, value = torch.randn(4, 9, HEAD), torch.randn(2, 9, HEAD), torch.randn(2, 9, HEAD)
    plan = make_plan([4, 1, 4], [4, 1, 4], NOTHING_CACHED, dtype=torch.float32)
    assert plan.read_index.numel() == 0
    got = attend(query, key, value, plan)
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        expected = naive(query[:, part], key[:, part], value[:, part], window=None, softcap=None)
        torch.testing.assert_close(got[part].double(), expected, atol=1e-5, rtol=1e-5)


SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "eos_token_id": None,
}
MODELS: dict[str, tuple[type[PreTrainedModel], object]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "sliding": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=16)),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**SHAPE, sliding_window=16, attn_logit_softcapping=0.5),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_give_the_same_tokens_as_with_their_own_attention(
    name: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Greedy tokens equal the plain forward pass's, with prompts read in chunks in a batch.

    The next turn of a chat reads what is new, with a sliding window, too.
    """
    folder = shutil.copytree(tiny_model_dir, tmp_path / name)
    kind, config = MODELS[name]
    torch.manual_seed(1)
    model = kind(config).eval()
    model.save_pretrained(folder)
    model.set_attn_implementation("eager")
    # A step has 24 tokens, four of them for decoding requests.
    monkeypatch.setattr(transformers_backend, "PROMPT_TOKENS_PER_STEP", 20)
    settings = {"source": "local", "name": str(folder), "engine": "transformers"}
    with caplog.at_level(logging.INFO, logger="llm_service"):
        backend = load(ModelSettings(**settings, dtype="float32"), max_running=4)
    assert f"attention is {NAME}" in caplog.text
    prompts = {f"r{i}": [(7 * i + j) % 290 + 3 for j in range(5 + 23 * i)] for i in range(4)}
    events = run(backend, *(request(r, prompt, 12) for r, prompt in prompts.items()))
    for r, prompt in prompts.items():
        answer = tokens(events[r])
        assert answer == _greedy(model, prompt, len(answer))
        assert len(answer) >= 4
    turn = [*prompts["r3"], *tokens(events["r3"]), 5, 6, 7]
    after = run(backend, request("turn", turn, 4))["turn"]
    assert after[0].cached_tokens >= PAGE_SIZE
    assert tokens(after) == _greedy(model, turn, 4)


@pytest.mark.parametrize("feature", ["s_aux", "position_bias"])
def test_unsupported_features_are_an_error(feature: str) -> None:
    """A feature that the attention does not have raises an error instead of being ignored."""
    row = torch.zeros(1, 4, 3, HEAD)
    asked: dict[str, Any] = {feature: row}
    with pytest.raises(NotImplementedError, match=f"{feature} is not supported"):
        AttentionInterface()[NAME](torch.nn.Module(), row, row, row, None, **asked)


@pytest.mark.parametrize(
    ("mask", "window", "calls", "feature"),
    [
        (torch.zeros(1, 1, 3, 3), None, 1, "a mask of its own"),
        (None, 2, 1, "another window"),
        (None, None, 2, "a layer that runs twice"),
    ],
)
def test_a_layer_that_does_not_fit_its_plan_is_an_error(
    mask: Tensor | None, window: int | None, calls: int, feature: str
) -> None:
    """A layer that would be computed wrongly raises an error instead."""

    class Cache:
        dtype = torch.float32

        def update(self, *, key_states: Tensor, value_states: Tensor, **_: Any) -> Any:
            return key_states, value_states

    row = torch.zeros(1, 4, 3, HEAD)
    layer = torch.nn.Module()
    layer.layer_idx = 0  # type: ignore[assignment]
    plans = StepPlans([3], [3], NOTHING_CACHED, torch.float32, [None])
    call = partial(
        AttentionInterface()[NAME],
        *(layer, row, row, row, mask),
        **{"sliding_window": window, "cache": Cache(), PLANS: plans},
    )
    for _ in range(calls - 1):
        call()
    with pytest.raises(NotImplementedError, match=f"{feature} is not supported"):
        call()


def test_a_model_with_unsupported_attention_is_not_served(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no way of serving supports it, the error is the line that the operator gets."""

    def unsupported(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("attention with s_aux is not supported")

    monkeypatch.setattr(LlamaAttention, "forward", unsupported)
    assert refusal(tiny_model_dir, engine="transformers") == (
        f"{tiny_model_dir} is of a kind that transformers cannot serve (attention with s_aux is "
        "not supported): choose another model"
    )


def _greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]
