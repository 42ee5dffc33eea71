"""Packed and 8-bit linear layers equal the plain ones within stated bounds."""

import pytest
import torch
from torch import nn

from app.core.config import ModelSettings
from app.llm.engine.transformers import cpu_linear
from app.llm.engine.transformers.cpu_linear import (
    Int8Linear,
    PackedLinear,
    RowQuantizer,
    replace_linears,
)
from app.utils.errors import ModelLoadError
from tests.support.backends import load

needs_bf16 = pytest.mark.skipif(
    not cpu_linear.can_pack(), reason="this CPU has no bfloat16 kernels"
)
needs_int8 = pytest.mark.skipif(
    cpu_linear.why_no_int8(torch.bfloat16) is not None, reason="this CPU has no VNNI instructions"
)


def linear(bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    """A layer with random weights."""
    torch.manual_seed(0)
    return nn.Linear(96, 160, bias=bias).to(dtype).requires_grad_(requires_grad=False)


@needs_bf16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 32, 300])
def test_a_packed_layer_equals_the_plain_one(rows: int, bias: bool) -> None:
    """The result is the same but for the last two bits of bfloat16."""
    plain = linear(bias)
    packed = PackedLinear(plain)
    x = torch.randn(1, rows, 96).bfloat16()
    torch.testing.assert_close(packed(x), plain(x), atol=1e-2, rtol=1e-2)
    assert torch.equal(packed.weight, plain.weight)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 32, 300])
def test_an_int8_layer_is_close_to_the_plain_one(rows: int, bias: bool, dtype: torch.dtype) -> None:
    """The result differs by at most 2 % of the largest output."""
    plain = linear(bias, dtype)
    x = torch.randn(1, rows, 96).to(dtype)
    expected, got = plain(x), Int8Linear(plain, RowQuantizer())(x)
    assert got.dtype == dtype
    assert (got - expected).abs().max() <= 0.02 * expected.abs().max()


@needs_int8
def test_a_row_has_its_own_scale() -> None:
    """A row with huge values does not change the result of another row."""
    layer = Int8Linear(linear(), RowQuantizer())
    row = torch.randn(1, 1, 96).bfloat16()
    beside = torch.cat([row, 1e4 * torch.randn(1, 3, 96).bfloat16()], dim=1)
    assert torch.equal(layer(beside)[:, :1], layer(row))


def test_rows_of_zeros_and_extremes_quantize_without_overflow() -> None:
    """Zero stays zero, and the largest values of both signs use the whole range."""
    x = torch.tensor([[0.0, 0.0, 0.0], [5.0, -5.0, 0.0], [3e38, 1.0, -3e38]])
    integers, scales = RowQuantizer()(x)
    assert integers.tolist() == [[128, 128, 128], [255, 1, 128], [255, 128, 1]]
    assert torch.isfinite(scales).all()


def test_the_last_input_is_quantized_once() -> None:
    """The same tensor is quantized once, and another one of equal shape again."""
    quantize = RowQuantizer()
    first, second = torch.ones(1, 4), torch.tensor([[1.0, -1.0, 0.5, 0.0]])
    assert quantize(first) is quantize(first)
    assert quantize(second)[0].tolist() == [[255, 1, 191, 128]] or (
        quantize(second)[0].tolist() == [[255, 1, 192, 128]]
    )


@needs_bf16
def test_only_plain_linear_layers_are_replaced() -> None:
    """Subclasses of the linear layer, other layers and float32 layers are kept."""

    class Special(nn.Linear):
        pass

    model = nn.Sequential(linear(), nn.Sequential(linear()), Special(4, 4), nn.LayerNorm(4))
    replace_linears(model, "none", torch.float32)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    replace_linears(model, "none", torch.bfloat16)
    assert [type(m) for m in model] == [PackedLinear, nn.Sequential, Special, nn.LayerNorm]
    assert [type(m) for m in model[1].children()] == [PackedLinear]


@needs_int8
@needs_bf16
def test_only_large_layers_become_int8() -> None:
    """With int8 a small layer is packed, because quantizing would make it slower."""
    large = nn.Linear(2048, 1024, bias=False).bfloat16()
    model = nn.Sequential(large, linear())
    replace_linears(model, "int8", torch.bfloat16)
    assert [type(m) for m in model] == [Int8Linear, PackedLinear]


def test_int8_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA, a CPU without the instructions and float16 each give a line that says what to do."""
    with pytest.raises(ModelLoadError, match="only a CPU runs: set MODEL__QUANTIZATION=none"):
        load(ModelSettings(device="cuda", quantization="int8", engine="transformers"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    assert "MODEL__DTYPE=auto" in (cpu_linear.why_no_int8(torch.float16) or "")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert "no VNNI" in (cpu_linear.why_no_int8(torch.bfloat16) or "")
