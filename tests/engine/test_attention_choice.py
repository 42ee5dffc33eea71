"""Which attention a model gets, with a fake model on a fake GPU."""

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
    """The attributes that decide."""

    def __init__(self, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.unsupported: set[str] = set()

    def set_attn_implementation(self, name: str) -> None:
        if name in self.unsupported:
            raise ImportError(f"{name} needs another GPU")
        self.config._attn_implementation = name


def _installed(monkeypatch: pytest.MonkeyPatch, *versions: int) -> None:
    for version in (2, 3):
        here = version in versions
        name = f"is_flash_attn_{version}_available"
        # transformers' functions have an argument that allows kernels from the hub; it is not used.
        monkeypatch.setattr(attention_choice, name, lambda here=here: here)


@pytest.mark.parametrize(
    ("versions", "chosen", "page"),
    [((), "sdpa", 32), ((2,), "flash_attention_2", 256), ((2, 3), "flash_attention_3", 32)],
)
def test_an_installed_flash_attention_is_used(
    versions: tuple[int, ...], chosen: str, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest installed version is used and kept; without one a GPU keeps sdpa."""
    _installed(monkeypatch, *versions)
    model = _Model("cuda")
    prefer_flash_attention(model)
    assert not attend_per_request(model)
    assert attention_of(model) == chosen
    assert page_size_for(model) == page


@pytest.mark.parametrize(
    "model", [_Model("cpu"), _Model("cuda", torch.float32)], ids=["cpu", "float32"]
)
def test_flash_attention_needs_a_gpu_and_16_bits(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not used on a CPU or in float32, although it is installed."""
    _installed(monkeypatch, 2, 3)
    prefer_flash_attention(model)
    assert attention_of(model) == "sdpa"


def test_a_flash_attention_that_fails_is_skipped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next version is used, and the log has the reason."""
    _installed(monkeypatch, 2, 3)
    model = _Model("cuda")
    model.unsupported.add("flash_attention_3")
    with caplog.at_level(logging.WARNING, logger="llm_service"):
        prefer_flash_attention(model)
    assert attention_of(model) == "flash_attention_2"
    assert "flash attention 3 cannot be used: flash_attention_3 needs another GPU" in caplog.text
