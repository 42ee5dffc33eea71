"""Quantizes a model's linear layers while transformers loads it, tensor by tensor.

transformers hands each tensor to the model's quantizer as soon as it is read, so that only one is
in memory in full precision at a time.
"""

from typing import Any, Final

from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from app.llm.engine.transformers.integer_linear import (
    IntegerLinear,
    bits_of,
    can_quantize,
    compile_products,
)

_NAME: Final = "cpu_integers"


@register_quantization_config(_NAME)
class IntegerConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Says to ``from_pretrained`` how many bits the weights get: 8 or 4."""

    def __init__(self, bits: int) -> None:
        self.quant_method = _NAME
        self.bits = bits


class _Quantize(ConversionOps):  # type: ignore[misc]
    """Puts an integer layer in the place of a linear layer whose weight was read."""

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: Any,
        full_layer_name: str,
        missing_keys: set[str],
        **_: Any,
    ) -> dict[str, Any]:
        """Take the one tensor of ``input_dict``, or leave it where its shape is wrong."""
        (weight,) = (v[0] if isinstance(v, list) else v for v in input_dict.values())
        name = full_layer_name.removesuffix(".weight")
        linear = model.get_submodule(name)
        if weight.shape != linear.weight.shape:
            return input_dict
        # Its bias is read before or after, and stays a parameter of this name.
        linear.weight = nn.Parameter(weight, requires_grad=False)
        model.set_submodule(name, IntegerLinear(linear, bits_of(linear, model, self._bits)))
        compile_products(model.get_submodule(name.rpartition(".")[0]))
        missing_keys.discard(full_layer_name)
        return {}


@register_quantizer(_NAME)
class IntegerQuantizer(HfQuantizer):  # type: ignore[misc]
    """The quantizer that ``from_pretrained`` finds by the name in an :class:`IntegerConfig`."""

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether a tensor is the weight of a layer that is worth quantizing."""
        name, _dot, kind = param_name.rpartition(".")
        return kind == "weight" and can_quantize(model.get_submodule(name))

    def get_quantize_ops(self) -> ConversionOps:
        """What is done with such a tensor."""
        return _Quantize(self.quantization_config.bits)

    def is_serializable(self) -> bool:
        """The model is never saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """The model is never trained."""
        return False
