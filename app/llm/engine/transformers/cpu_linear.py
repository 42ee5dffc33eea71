"""Linear layers for a CPU with bfloat16 weights that are packed once.

torch's layer repacks a bfloat16 weight at every call, which takes longer than the arithmetic in
small batches. The layer here uses torch's oneDNN kernels.
"""

import torch
from torch import Tensor, nn


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


def can_pack() -> bool:
    """Whether oneDNN multiplies in bfloat16 on this CPU."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace a model's linear layers in place with packed ones, where they are in bfloat16."""
    if dtype != torch.bfloat16 or not can_pack():
        return
    for name, child in list(model.named_modules(remove_duplicate=False)):
        # A subclass may compute something else.
        if type(child) is nn.Linear:
            model.set_submodule(name, PackedLinear(child))
