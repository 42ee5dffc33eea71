"""Packed and integer linear layers equal the plain ones within stated bounds."""

import copy
import mmap

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.llm.engine.transformers import cpu_linear, integer_linear
from app.llm.engine.transformers.cpu_linear import PackedLinear, pack_linears
from app.llm.engine.transformers.integer_linear import IntegerLinear, quantize_linears

needs_bf16 = pytest.mark.skipif(
    not cpu_linear.can_pack(), reason="this CPU has no bfloat16 kernels"
)


class Attention(nn.Module):
    """Layers with the names of an attention's, of which three read the same rows."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(columns, 320, bias=False)
        self.k_proj = nn.Linear(columns, 64, bias=True)
        self.v_proj = nn.Linear(columns, 64, bias=False)
        self.o_proj = nn.Linear(columns, 96, bias=False)
        self.requires_grad_(requires_grad=False)

    def get_output_embeddings(self) -> None:
        """It has none."""

    def forward(self, x: Tensor) -> Tensor:
        """All results beside each other."""
        return torch.cat([layer(x) for layer in self.children()], -1)


def linear(bias: bool = True, dtype: torch.dtype = torch.bfloat16, columns: int = 96) -> nn.Linear:
    """A layer with random weights."""
    torch.manual_seed(0)
    return nn.Linear(columns, 160, bias=bias).to(dtype).requires_grad_(requires_grad=False)


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


@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bias", "columns"), [(True, 96), (False, 96), (False, 2304)])
def test_an_integer_layer_is_close_to_the_plain_one(
    bits: int, error: float, bias: bool, columns: int, dtype: torch.dtype
) -> None:
    """The result differs by at most 2 or 10 % of the largest output, for any number of rows."""
    plain = linear(bias, dtype, columns)
    layer = IntegerLinear(plain, bits)
    for rows in (1, 7, 32, 300):
        x = torch.randn(1, rows, columns).to(dtype)
        expected, got = plain(x), layer(x)
        assert got.dtype == dtype
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= error * expected.abs().max()
    assert layer.weight.dtype == dtype


@pytest.mark.parametrize("columns", [256, 2304])
@pytest.mark.parametrize("bits", [8, 4])
def test_nothing_reads_what_an_integer_layer_has_given_back(
    monkeypatch: pytest.MonkeyPatch, bits: int, columns: int
) -> None:
    """Results of any number of rows are the same with the original integers and without."""
    monkeypatch.setattr(integer_linear, "WORTH_QUANTIZING", 1)
    plain = Attention(columns)
    layers, whole = copy.deepcopy(plain), copy.deepcopy(plain)
    quantize_linears(layers, bits)
    with monkeypatch.context() as kept:
        kept.delattr(mmap, "MADV_DONTNEED")
        quantize_linears(whole, bits)
    for rows in (1, 2, 3, 5, 8, 16, 17, 32, 33, 64, 100, 288):
        x = torch.randn(rows, columns)
        assert torch.equal(layers(x), whole(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_computed_together_give_what_each_gives(
    monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    """Layers get their own results in any order, for new rows and for the same rows again."""
    monkeypatch.setattr(integer_linear, "WORTH_QUANTIZING", 1)
    plain = Attention(256)
    model = copy.deepcopy(plain)
    quantize_linears(model, bits)
    alone = {
        name: IntegerLinear(layer, bits)
        for name, layer in plain.named_children()
        if isinstance(layer, nn.Linear)
    }
    first, second = torch.randn(3, 256), torch.randn(2, 256)
    for name, x in (
        *(("q_proj", first), ("v_proj", first), ("q_proj", first), ("k_proj", second)),
        *(("k_proj", first), ("o_proj", first), ("v_proj", first), ("v_proj", second)),
    ):
        assert torch.equal(model.get_submodule(name)(x), alone[name](x))


def test_4_bits_of_a_gguf_file_stay_exact() -> None:
    """Weights that have 16 values in each group of 32 get those values, whatever their offset."""
    torch.manual_seed(0)
    values = torch.randint(0, 16, (64, 3, 32)) * 0.0078125 - torch.rand(64, 3, 1)
    values[..., 0], values[..., 1] = values.amin(-1), values.amin(-1) + 15 * 0.0078125
    plain = nn.Linear(96, 64, bias=False)
    plain.weight.data = values.view(64, 96)
    got = IntegerLinear(plain, 4)(torch.eye(96))
    assert (got.T - plain.weight).abs().max() < 0.01


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_has_its_own_scale(bits: int) -> None:
    """A row with huge values does not change the result of another row."""
    layer = IntegerLinear(linear(), bits)
    row = torch.randn(1, 1, 96).bfloat16()
    beside = torch.cat([row, 1e4 * torch.randn(1, 3, 96).bfloat16()], dim=1)
    assert torch.equal(layer(beside)[:, :1], layer(row))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_of_zeros_gives_zeros_and_one_without_values_says_so(bits: int) -> None:
    """No group divides by zero, and a weight of NaN is found."""
    plain = linear(bias=False)
    plain.weight.data.zero_()
    layer = IntegerLinear(plain, bits)
    assert layer.is_finite
    assert not layer(torch.ones(2, 96)).any()
    plain.weight.data[3, 5] = np.nan
    assert not IntegerLinear(plain, bits).is_finite


@needs_bf16
def test_only_plain_linear_layers_are_replaced() -> None:
    """Subclasses of the linear layer, other layers and float32 layers are kept."""

    class Special(nn.Linear):
        pass

    model = nn.Sequential(linear(), nn.Sequential(linear()), Special(4, 4), nn.LayerNorm(4))
    pack_linears(model, torch.float32)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    pack_linears(model, torch.bfloat16)
    assert [type(m) for m in model] == [PackedLinear, nn.Sequential, Special, nn.LayerNorm]
    assert [type(m) for m in model[1].children()] == [PackedLinear]
