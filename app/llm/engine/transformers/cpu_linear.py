"""Linear layers for a CPU: bfloat16 weights packed once, or 8-bit integers.

torch's layer repacks a bfloat16 weight at every call, which takes longer than the arithmetic in
small batches. Both layers here use torch's oneDNN kernels.
"""

from typing import Final, Literal

import torch
from torch import Tensor, nn

Quantization = Literal["none", "int8"]

WORTH_QUANTIZING: Final = 1 << 21
"""From this number of weights on, reading half the bytes saves more than quantizing costs."""

# Activations are unsigned, as the processor's instruction requires; this value stands for 0.
_ZERO_POINT: Final = 128
_LARGEST: Final = 127
# A row of zeros would divide by zero.
_SMALLEST_SCALE: Final = 1e-12


class PackedLinear(nn.Module):
    """A linear layer in bfloat16 whose weight is packed once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias: Tensor | None = linear.bias

    @property
    def weight(self) -> Tensor:
        """The original weight, for models that read its dtype; unpacked at each access."""
        weight: Tensor = self._packed.to_dense()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., in_features] by the weight's transpose, and add the bias."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y


class RowQuantizer:
    """Quantizes activations to 8-bit integers, with a scale for each row.

    A row is a token of a request. One scale for all would round a row by the largest value of its
    batch. The last result is kept, because several layers in succession have the same input.
    """

    def __init__(self) -> None:
        self._input: Tensor | None = None
        self._output: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize ``x`` [..., features] to uint8 with 128 for 0, and row scales [..., 1]."""
        if x is not self._input or self._output is None:
            values = x.float()
            scale = values.abs().amax(-1, keepdim=True).mul_(1 / _LARGEST)
            scale = scale.clamp_min_(_SMALLEST_SCALE)
            # The conversion truncates, so adding one half rounds. Going through int32 is faster,
            # because only that conversion is vectorised.
            integers = (values / scale).add_(_ZERO_POINT + 0.5).to(torch.int32).to(torch.uint8)
            self._input, self._output = x, (integers, scale)
        return self._output


class Int8Linear(nn.Module):
    """A linear layer in 8-bit integers, with a scale for each output channel and each input row.

    Args:
        quantize: Shared by all layers of a model.
    """

    def __init__(self, linear: nn.Linear, quantize: RowQuantizer) -> None:
        super().__init__()
        self._quantize = quantize
        weight = linear.weight.detach().float()
        self._scales = (weight.abs().amax(1) / _LARGEST).clamp_min_(_SMALLEST_SCALE)
        integers = torch.round(weight / self._scales.unsqueeze(-1)).to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(integers, None)
        self._zero_points = torch.zeros(linear.out_features, dtype=torch.int64)
        self.bias: Tensor | None = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., in_features] by the weight's transpose, and add the bias."""
        integers, row_scales = self._quantize(x)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            integers,
            1.0,
            _ZERO_POINT,
            self._packed,
            self._scales,
            self._zero_points,
            None,
            1.0,
            0,
            x.dtype,
            "none",
            [],
            "",
        )
        y = y.mul_(row_scales)
        return y if self.bias is None else y.add_(self.bias)


def can_pack() -> bool:
    """Whether oneDNN multiplies in bfloat16 on this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def replace_linears(model: nn.Module, quantization: Quantization, dtype: torch.dtype) -> None:
    """Replace a model's linear layers in place with faster ones.

    Args:
        model: A model on a CPU; its other layers are kept.
        quantization: ``int8``: layers of at least :data:`WORTH_QUANTIZING` weights become 8-bit.
        dtype: Precision of the weights.
    """
    quantize = RowQuantizer()
    packs = dtype == torch.bfloat16 and can_pack()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            # A subclass may compute something else.
            if type(child) is not nn.Linear:
                continue
            if quantization == "int8" and child.weight.numel() >= WORTH_QUANTIZING:
                setattr(parent, name, Int8Linear(child, quantize))
            elif packs:
                setattr(parent, name, PackedLinear(child))


def why_no_int8(dtype: torch.dtype) -> str | None:
    """Why this CPU cannot compute in 8-bit integers; ``None`` if it can."""
    cpu = torch.cpu.get_capabilities()
    if not (cpu.get("avx512_vnni") or cpu.get("amx_tile")):
        return (
            "model.quantization is int8, but this CPU has no VNNI instructions: "
            "set MODEL__QUANTIZATION=none"
        )
    if dtype not in {torch.float32, torch.bfloat16}:
        return (
            "model.quantization is int8, which goes with float32 or bfloat16: set MODEL__DTYPE=auto"
        )
    return None
