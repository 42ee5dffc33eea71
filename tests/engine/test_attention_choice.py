"""Which attention a model gets, on machines that this one is not."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.llm.engine.transformers import attention_choice
from app.llm.engine.transformers.attention_choice import (
    attend_per_request,
    attention_of,
    page_size_for,
    prefer_flash_attention,
)


class _Model:
    """What the choice looks at."""

    def __init__(self, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.refused: set[str] = set()

    def set_attn_implementation(self, name: str) -> None:
        if name in self.refused:
            raise ImportError(f"{name} needs another GPU")
        self.config._attn_implementation = name


def _installed(monkeypatch: pytest.MonkeyPatch, *versions: int) -> None:
    for version in (2, 3):
        here = version in versions
        name = f"is_flash_attn_{version}_available"
        # transformers' functions take whether kernels may come from the hub; they may not.
        monkeypatch.setattr(attention_choice, name, lambda here=here: here)


@pytest.mark.parametrize(
    ("versions", "chosen", "page"),
    [((), "sdpa", 32), ((2,), "flash_attention_2", 256), ((2, 3), "flash_attention_3", 32)],
)
def test_an_installed_flash_attention_is_used(
    versions: tuple[int, ...], chosen: str, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest that is there, and it stays; without any, a GPU keeps sdpa."""
    _installed(monkeypatch, *versions)
    model = _Model("cuda")
    prefer_flash_attention(model)
    assert not attend_per_request(model)
    assert attention_of(model) == chosen
    assert page_size_for(model) == page


@pytest.mark.parametrize(
    "model", [_Model("cpu"), _Model("cuda", torch.float32)], ids=["cpu", "float32"]
)
def test_flash_attention_is_not_asked_for_what_it_cannot(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs neither on a CPU nor in 32 bits, wherever it is installed."""
    _installed(monkeypatch, 2, 3)
    prefer_flash_attention(model)
    assert attention_of(model) == "sdpa"


def test_a_flash_attention_that_refuses_gives_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next one is taken, and the log says why."""
    _installed(monkeypatch, 2, 3)
    model = _Model("cuda")
    model.refused.add("flash_attention_3")
    with caplog.at_level(logging.WARNING, logger="llm_service"):
        prefer_flash_attention(model)
    assert attention_of(model) == "flash_attention_2"
    assert "flash attention 3 cannot be used: flash_attention_3 needs another GPU" in caplog.text
