"""Weights of torch as OpenVINO's constants: as they are, or rounded to 8 or 4 bits.

OpenVINO multiplies integers where a scale and an offset, for a row or for a group of a row's
weights, follow the constant in this very order of operations.
"""

from typing import Any, Final

import openvino
import torch
from openvino import Type
from openvino import opset13 as ops
from torch import Tensor

# Weights of a row that share a scale, as many as divide the row. Larger groups are
# faster; the rows of small models, which lose most, have the smallest.
_GROUP_SIZES: Final = (64, 32)
_SHORT_ROW: Final = 2048

# Weights that are rounded at a time, in float32.
_AT_ONCE: Final = 1 << 22
# The scale of a row of zeros, by which none is divided; the smallest number of float16.
_SMALLEST_SCALE: Final = 6e-8
# The first of two integers of 4 bits is in the lower half of their byte.
_HALVES: Final = torch.tensor([1.0, 16.0])
_TYPES: Final = {torch.float32: Type.f32, torch.bfloat16: Type.bf16, torch.float16: Type.f16}


_Parts = tuple[Tensor, Tensor, Tensor]
"""Integers, offsets and scales."""


def weight_constant(weight: Tensor, bits: int, *, grouped: bool = True) -> Any:
    """A node that gives a weight [rows, columns] in float32.

    Args:
        weight: Its values, which are read before this returns.
        bits: 8 or 4; 16 keeps the weight's own type. Rows that no group size divides get 8 for 4.
        grouped: Whether parts of a row have scales, and not the whole row.
    """
    rows, columns = weight.shape
    if bits > 8:
        values = _constant(weight.contiguous(), [rows, columns], _TYPES[weight.dtype])
        return ops.convert(values, "f32")
    sizes = _GROUP_SIZES[1:] if columns < _SHORT_ROW else _GROUP_SIZES
    group = next((size for size in sizes if grouped and columns % size == 0), columns)
    largest, kind = (15, Type.u4) if bits == 4 and group < columns else (255, Type.u8)
    parts = _rounded(weight, group, largest)
    if group == columns:
        return ops.convert(_scaled(parts, [rows, columns], kind), "f32")
    node = _scaled(parts, [rows, columns // group, group], kind)
    return ops.convert(ops.reshape(node, ops.constant([rows, columns]), special_zero=False), "f32")


def _rounded(weight: Tensor, group: int, largest: int) -> _Parts:
    """Integers from 0 to ``largest``, with an offset and a scale for each group of weights."""
    step = max(1, _AT_ONCE // weight.shape[1])
    parts = [_round(part.float().view(-1, group), largest) for part in torch.split(weight, step)]
    integers, offsets, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return integers, offsets, scales


def _round(values: Tensor, largest: int) -> _Parts:
    low, high = values.aminmax(dim=1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = ((high - low) / largest).clamp_(min=_SMALLEST_SCALE).half()
    exact = scales.float()
    offsets = (-low / exact).round_().clamp_(0, largest)
    integers = (values / exact).round_().add_(offsets).clamp_(0, largest)
    if largest == 15:
        integers, offsets = (pair.view(-1, 2) @ _HALVES for pair in (integers, offsets))
    return integers.to(torch.uint8), offsets.to(torch.uint8), scales


def _scaled(parts: _Parts, shape: list[int], kind: Type) -> Any:
    integers, offsets, scales = parts
    each = [*shape[:-1], 1]
    integer, offset = (
        ops.convert(_constant(values, size, kind), "f16")
        for values, size in ((integers, shape), (offsets, each))
    )
    return ops.multiply(ops.subtract(integer, offset), _constant(scales, each, Type.f16))


def _constant(values: Tensor, shape: list[int], kind: Type) -> Any:
    data = values.view(torch.uint8).numpy()
    # By default it would point into the memory of torch, which ends before the graph does.
    tensor = openvino.Tensor(data, openvino.Shape(shape), kind)
    return openvino.op.Constant(tensor, shared_memory=False)
