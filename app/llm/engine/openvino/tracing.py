"""Makes OpenVINO's graph of a model of transformers, with the KV cache inside.

torch's tracer records one forward pass. Linear layers, embeddings and attention are operators of
our own in it, which give tensors of the right shape and compute nothing, so the trace of a large
model takes seconds and no memory. Each is replaced by nodes of OpenVINO: a weight as it is to be
stored, and attention with its cache, in the form that OpenVINO turns into paged attention.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import openvino
import torch
from openvino import opset13 as ops
from openvino.frontend.pytorch import ConversionExtension
from openvino.op.util import Variable, VariableInfo
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface

from app.llm.models.load_errors import one_line

NAME: Final = "traced"
"""The attention function's name in a model's configuration."""

_TRACE: Final = "openvino_trace"
# Layers that attend to all tokens before, or to the last ones.
_KINDS: Final = {"full_attention", "sliding_attention"}
_LEAST_SCORE: Final = np.float32(-65504)

torch.library.define("llm_service::linear", "(Tensor x, int weight, int width) -> Tensor")
torch.library.define("llm_service::embed", "(Tensor ids, int weight, int width) -> Tensor")
torch.library.define(
    "llm_service::attend",
    "(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor beams, int layer) -> Tensor",
)


@torch.library.impl("llm_service::linear", "CPU")
def _linear(x: Tensor, _: int, width: int) -> Tensor:
    return x.new_zeros((*x.shape[:-1], width))


@torch.library.impl("llm_service::embed", "CPU")
def _embed(ids: Tensor, _: int, width: int) -> Tensor:
    return torch.zeros((*ids.shape, width))


@torch.library.impl("llm_service::attend", "CPU")
def _attend(
    query: Tensor, _key: Tensor, value: Tensor, _mask: Tensor, _beams: Tensor, _: int
) -> Tensor:
    return query.new_zeros((*query.shape[:-1], value.shape[-1]))


class UnconvertibleError(Exception):
    """The model computes something that OpenVINO's graph would not."""


@dataclass(frozen=True)
class _Attention:
    """One layer's attention; ``window`` is 0 where it has no limit."""

    heads: int
    shared: int
    key_size: int
    value_size: int
    scale: float
    window: int


class _Trace(TorchFunctionMode):
    """Puts our operators in the place of layers while it is entered.

    Args:
        model: Its weights are taken out of it, and what is left is float32.

    Attributes:
        weights: By the numbers in the operators, as are the layers; later their nodes.
        mask, beams: Inputs of the graph.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layers: list[_Attention] = []
        self.weights: list[Any] = []
        self.mask = self.beams = torch.empty(0)
        self._numbers: dict[int, int] = {}
        for module in model.modules():
            is_layer = isinstance(module, nn.Linear | nn.Embedding)
            if is_layer and id(module.weight) not in self._numbers:
                self._numbers[id(module.weight)] = len(self.weights)
                self.weights.append(module.weight.data)
                # A layer may look at the shape and type of its weight.
                module.weight.data = torch.zeros(()).expand(module.weight.shape)
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and id(tensor) not in self._numbers:
                tensor.data = tensor.data.float()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the operator instead of a function on one of the weights."""
        kwargs = kwargs or {}
        number = self._numbers.get(id(args[1])) if len(args) > 1 else None
        if number is not None and func is functional.embedding:
            return torch.ops.llm_service.embed(args[0], number, args[1].shape[1])
        if number is not None and func is functional.linear:
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            result = torch.ops.llm_service.linear(args[0], number, args[1].shape[0])
            return result if bias is None else result + bias
        return func(*args, **kwargs)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls, with tensors [batch, heads, tokens, size]."""
    trace: _Trace | None = kwargs.get(_TRACE)
    if trace is None:
        raise UnconvertibleError("its layers do not pass arguments on to attention")
    for feature in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(feature) is not None:
            raise UnconvertibleError(f"OpenVINO's paged attention has no {feature}")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise UnconvertibleError("its attention is not causal")
    window = sliding_window or 0
    if window != (0 if attention_mask is None else int(attention_mask)):
        raise UnconvertibleError("the window of its attention is not that of its mask")
    scale = float(query.shape[-1]) ** -0.5 if scaling is None else float(scaling)
    inputs = query, key, value, trace.mask, trace.beams
    result = torch.ops.llm_service.attend(*inputs, len(trace.layers))
    trace.layers.append(
        _Attention(
            heads=int(query.shape[1]),
            shared=int(key.shape[1]),
            key_size=int(key.shape[3]),
            value_size=int(value.shape[3]),
            scale=scale,
            window=window,
        )
    )
    return result.transpose(1, 2).contiguous(), None


def _mask(*_: Any, local_size: int | None = None, **__: Any) -> Tensor:
    """In the place of a mask: its window, which attention compares with its own."""
    return torch.tensor(local_size or 0)


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, _mask)


class _Inputs(nn.Module):
    """The model with the inputs that OpenVINO's pipelines give."""

    def __init__(self, model: Any, trace: _Trace) -> None:
        super().__init__()
        self.model = model
        self._trace = trace

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor
    ) -> Any:
        self._trace.mask, self._trace.beams = attention_mask, beam_idx
        options = {"use_cache": False, _TRACE: self._trace}
        return self.model(input_ids=input_ids, position_ids=position_ids, **options).logits


class _Graph:
    """Nodes for the operators of a trace; ``sinks`` are the ends of the KV cache."""

    def __init__(self, trace: _Trace, constant: Callable[[Tensor], Any]) -> None:
        self.sinks: list[Any] = []
        self._layers, self._weights = trace.layers, trace.weights
        self._constant = constant

    def extensions(self) -> list[ConversionExtension]:
        """What OpenVINO calls for each operator."""
        converters = {"linear": self._linear, "embed": self._embed, "attend": self._attend}
        return [
            ConversionExtension(f"llm_service::{name}", convert)
            for name, convert in converters.items()
        ]

    def _weight(self, context: Any) -> Any:
        number = context.get_values_from_const_input(1)
        if isinstance(weight := self._weights[number], Tensor):
            # Embedding and output layer may share one. The tensor's memory ends here.
            self._weights[number] = self._constant(weight)
        return self._weights[number]

    def _linear(self, context: Any) -> Any:
        return ops.matmul(context.get_input(0), self._weight(context), False, True).outputs()

    def _embed(self, context: Any) -> Any:
        return ops.gather(self._weight(context), context.get_input(0), _number(0)).outputs()

    def _attend(self, context: Any) -> Any:
        query, key, value, mask, beams = (context.get_input(i) for i in range(5))
        number = context.get_values_from_const_input(5)
        layer = self._layers[number]
        key = self._cached(key, f"key.{number}", beams, layer.shared, layer.key_size)
        value = self._cached(value, f"value.{number}", beams, layer.shared, layer.value_size)
        scores = _seen(query, key, mask, layer.window)
        keys, values = _repeat(key, layer, layer.key_size), _repeat(value, layer, layer.value_size)
        scale = ops.constant(np.float32(layer.scale))
        return ops.scaled_dot_product_attention(query, keys, values, scores, scale).outputs()

    def _cached(self, new: Any, name: str, beams: Any, heads: int, size: int) -> Any:
        """Keys or values of all tokens, which are kept for the next step."""
        info = VariableInfo()
        info.variable_id, info.data_type = name, openvino.Type.f32
        info.data_shape = openvino.PartialShape([-1, heads, -1, size])
        variable = Variable(info)
        shape = ops.concat([ops.shape_of(beams), _row(heads, 0, size)], 0)
        nothing = ops.broadcast(ops.constant(np.float32(0)), shape)
        past = ops.gather(ops.read_value(nothing, variable), beams, _number(0))
        whole = ops.concat([past, new], 2)
        self.sinks.append(ops.assign(whole, variable))
        return whole


def _repeat(node: Any, layer: _Attention, size: int) -> Any:
    """Keys or values for each of the heads that share them."""
    if layer.heads == layer.shared:
        return node
    shape = _row(1, 1, layer.heads // layer.shared, 1, 1)
    repeated = ops.broadcast(ops.unsqueeze(node, _number(2)), shape, broadcast_spec="BIDIRECTIONAL")
    return ops.reshape(repeated, _row(0, layer.heads, -1, size), special_zero=True)


def _seen(query: Any, key: Any, mask: Any, window: int) -> Any:
    """What is added to the scores, [batch, 1, queries, keys].

    OpenVINO knows a window by this form, in which two of the operands say nothing.
    """
    batch, queries, keys = (
        ops.gather(ops.shape_of(node), _row(axis), _number(0))
        for node, axis in ((query, 0), (query, 2), (key, 2))
    )
    last = ops.squeeze(keys, _number(0))
    first = ops.squeeze(ops.subtract(keys, queries), _number(0))
    key_place = ops.range(_number(0), last, _number(1), "i64")
    query_place = ops.unsqueeze(ops.range(first, last, _number(1), "i64"), _number(1))
    seen = ops.less_equal(key_place, query_place)
    if window:
        near = ops.greater(key_place, ops.add(query_place, _number(-window)))
        yes = ops.constant(np.array(True))
        seen = ops.bitwise_and(yes, ops.bitwise_and(ops.bitwise_and(yes, near), seen))
    seen = ops.bitwise_and(seen, ops.convert(ops.unsqueeze(mask, _row(1, 2)), "boolean"))
    seen = ops.broadcast(seen, ops.concat([batch, _row(1), queries, keys], 0))
    return ops.select(seen, ops.constant(np.float32(0)), ops.constant(_LEAST_SCORE))


def _number(value: int) -> Any:
    return ops.constant(np.int64(value))


def _row(*values: int) -> Any:
    return ops.constant(np.array(values, np.int64))


def to_openvino(model: Any, constant: Callable[[Tensor], Any]) -> openvino.Model:
    """Make the graph of a model of transformers, which is of no use afterwards.

    Args:
        model: In any precision; the graph computes in float32.
        constant: Makes the node of a weight [rows, columns].

    Raises:
        UnconvertibleError: The graph would not compute what the model does.
    """
    config = model.config.get_text_config()
    if not set(getattr(config, "layer_types", None) or ()) <= _KINDS:
        raise UnconvertibleError("it has layers of other kinds than attention")
    model.set_attn_implementation(NAME)
    trace = _Trace(model)
    graph = _Graph(trace, constant)
    places = openvino.PartialShape([-1, -1]), openvino.Type.i64
    ids = torch.ones((2, 3), dtype=torch.int64)
    example = {
        "input_ids": ids,
        "attention_mask": ids,
        "position_ids": torch.arange(3).repeat(2, 1),
        "beam_idx": torch.arange(2, dtype=torch.int32),
    }
    try:
        with trace, torch.no_grad(), warnings.catch_warnings(action="ignore"):
            # The tracer's own check would take as long again.
            traced = torch.jit.trace(  # type: ignore[no-untyped-call]
                _Inputs(model, trace), example_kwarg_inputs=example, strict=False, check_trace=False
            )
            result = openvino.convert_model(
                traced,
                input=[
                    *((name, *places) for name in [*example][:3]),
                    ("beam_idx", openvino.PartialShape([-1]), openvino.Type.i32),
                ],
                extension=graph.extensions(),
            )
    except UnconvertibleError:
        raise
    except Exception as error:
        raise UnconvertibleError(_short(error)) from error
    if len(trace.layers) != config.num_hidden_layers or len(graph.sinks) != 2 * len(trace.layers):
        raise UnconvertibleError("not all of its layers use transformers' attention interface")
    result.add_sinks(graph.sinks)
    result.outputs[0].get_tensor().set_names({"logits"})
    result.validate_nodes_and_infer_types()
    return result


def _short(error: Exception) -> str:
    """What a library's long message says of the part that it cannot convert."""
    missing = re.search(r"No conversion rule found for operations: (.+)", str(error))
    return f"OpenVINO has no {missing[1]}" if missing else one_line(error)[:200]
