"""What the transformers backend does beside what every backend must do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from app.llm.engine.transformers.backend import batching_config
from tests.support.backends import load_local, request, run, tokens


def _answer(model: Path) -> list[int]:
    return tokens(run(load_local(model, engine="transformers"), request("r"))["r"])


def test_a_model_that_computes_all_logits_says_the_same(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward pass without the argument ``logits_to_keep`` gives the same greedy tokens."""
    expected = _answer(tiny_model_dir)
    forward = LlamaForCausalLM.forward

    def without(self: LlamaForCausalLM, input_ids: Any = None, **kwargs: Any) -> Any:
        assert "logits_to_keep" not in kwargs
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", without)
    assert _answer(tiny_model_dir) == expected


def test_a_gpu_takes_plain_steps_and_its_share_of_the_memory() -> None:
    """The cache gets the share that is set, and transformers captures no step."""
    config = batching_config(SimpleNamespace(device=torch.device("cuda")), 8, 0.6)
    assert config.max_memory_percent == 0.6
    assert (config.num_blocks, config.max_batch_tokens) == (None, None)
    assert (config.max_requests_per_batch, config.use_cuda_graph) == (8, False)
