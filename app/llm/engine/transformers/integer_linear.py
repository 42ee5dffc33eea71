"""Linear layers in 8-bit and 4-bit integers on a CPU, computed by OpenVINO.

OpenVINO's matrix product rounds the activations to 8 bits by groups, each row for itself, and
multiplies integers. Layers that read the same rows, such as queries, keys and values, are one model
with a product each, because a call costs as much as half a million weights. ADR 12 has the
measurements.
"""

import mmap
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import groupby
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.llm.engine.cache_size import ROWS_OF_INTEGERS, WORTH_QUANTIZING
from app.llm.engine.openvino.loading import keep_telemetry_out
from app.llm.engine.transformers.pages import forget_pages, is_mapped, private_memory

keep_telemetry_out()

import openvino  # noqa: E402 - it would load its telemetry
from openvino import opset13 as ops  # noqa: E402

# Weights of a row that share a scale, as many as divide the row. Larger groups are faster. Small
# models lose most by 4 bits, so their rows, which are shorter than this number, have the smallest
# groups, and these have an offset each.
_GROUPS: Final = (128, 64, 32)
_SMALLEST: Final = 32
_SHORT: Final = 2048
# Names of layers that read the same rows in every architecture that has them.
_TOGETHER: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Weights that are rounded at a time, in float32.
_AT_ONCE: Final = 1 << 20
# A group of zeros would divide by zero; the smallest number of float16.
_SMALLEST_SCALE: Final = 6e-8


class IntegerLinear(nn.Module):
    """A linear layer in integers of 8 or 4 bits, with a scale for each group of a row's weights.

    Args:
        linear: The layer to replace; its in_features must have a group, see :func:`can_quantize`.
        bits: 8 or 4.

    Attributes:
        weight: A tensor without values, for models that read its type or shape.
        is_finite: Whether the weights had neither infinite values nor NaN.
    """

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.weight = torch.empty_like(weight, device="meta")
        self.bias: Tensor | None = linear.bias
        self.out_features, self.in_features = weight.shape
        self.quantized = _Quantized(weight, _group(self.in_features, bits), bits)
        self.is_finite = self.quantized.is_finite
        if is_mapped(weight):
            forget_pages(weight)
        self.product: Future[_Product] | None = None
        self._place = 0

    def compute_with(self, product: "Future[_Product]", place: int) -> None:
        """Take this layer's results from one place of a product."""
        self.product, self._place = product, place

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` [..., in_features] by the weight's transpose, and add the bias."""
        if self.product is None:
            self.product = _pool().submit(_Product, [self.quantized])
        y = self.product.result().part(x, self._place)
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y.add_(self.bias)


class _Product:
    """Multiplies the same rows by several weights in one call of OpenVINO.

    A model gives its layers one tensor, one layer after the other. The first of them computes the
    results of all.
    """

    def __init__(self, weights: Sequence["_Quantized"]) -> None:
        # OpenVINO's constants point to their memory.
        self._weights = weights
        self._columns = weights[0].columns
        self._sizes = [weight.shape[0] for weight in weights]
        self._request = _compile(weights)
        self._of: Tensor | None = None
        self._left: dict[int, Tensor] = {}
        # The first call copies integers and scales into another order. Nothing reads the originals
        # after it.
        self._multiply(torch.ones(1, self._columns))
        for weight in weights:
            weight.release()

    def part(self, x: Tensor, place: int) -> Tensor:
        """The results [rows, out_features] of one weight in float32."""
        if x is not self._of or place not in self._left:
            self._of, self._left = x, dict(enumerate(self._multiply(x)))
        part = self._left.pop(place)
        if not self._left:
            self._of = None
        return part

    def _multiply(self, x: Tensor) -> list[Tensor]:
        rows = x.reshape(-1, self._columns).float().contiguous()
        # The default type is the model's while others of its layers are read.
        results = [torch.empty(len(rows), size, dtype=torch.float32) for size in self._sizes]
        # Each layer keeps memory for the longest call that it has had, and more gain no speed.
        for first in range(0, len(rows), ROWS_OF_INTEGERS):
            part = slice(first, first + ROWS_OF_INTEGERS)
            self._use(*(_shared(t[part]) for t in (rows, *results)))
            self._request.infer()
        # The request keeps its tensors, and those of a prompt are large.
        self._use(*map(_nothing, (self._columns, *self._sizes)))
        return results

    def _use(self, x: openvino.Tensor, *results: openvino.Tensor) -> None:
        self._request.set_input_tensor(x)
        for place, result in enumerate(results):
            self._request.set_output_tensor(place, result)


class _Quantized:
    """A weight in integers.

    Attributes:
        integers: Signed, [rows, groups, group]; two of 4 bits share a byte.
        scales: float16 [rows, groups, 1].
        offsets: Added to all weights of a group, float32 [rows, groups].
    """

    def __init__(self, weight: Tensor, group: int, bits: int) -> None:
        rows, columns = weight.shape
        self.shape = (rows, columns // group, group)
        self.columns = columns
        self.bits = bits
        size, count = rows * columns * bits // 8, rows * columns // group
        self._memory = private_memory(size + 2 * count)
        kind = np.uint8 if bits == 4 else np.int8
        self.integers = np.frombuffer(self._memory, kind, size)
        self.scales = np.frombuffer(self._memory, np.float16, count, size)
        self.scales = self.scales.reshape(*self.shape[:2], 1)
        self.offsets = np.empty(self.shape[:2], np.float32)
        self.is_finite = True
        into = torch.from_numpy(self.integers).view(rows, -1)
        round_part = _round_to_4_bits if bits == 4 else _round_to_8_bits
        step = min(rows, max(1, _AT_ONCE // columns))
        # New memory for each part would take as long as the rounding.
        buffer = torch.empty(step, *self.shape[1:], dtype=torch.float32)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            values = buffer[: part.stop - start]
            values.view(len(values), columns).copy_(weight[part])
            integers, scales, offsets = round_part(values)
            self.is_finite &= bool(scales.isfinite().all())
            into[part] = integers.view(len(values), -1)
            self.scales[part], self.offsets[part] = scales.numpy(), offsets.squeeze(-1).numpy()

    def release(self) -> None:
        """Give back the memory that OpenVINO points to, which reads as zeros then."""
        if hasattr(mmap, "MADV_DONTNEED"):  # Windows has none.
            self._memory.madvise(mmap.MADV_DONTNEED)
        del self.offsets


def _round_to_8_bits(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scales and offsets of weights [rows, groups, group], which are overwritten."""
    low, high = _range(values)
    scales = _half(torch.maximum(-low, high) / 127)
    integers = values.div_(scales.float()).round_().clamp_(-127, 127)
    return integers, scales, torch.zeros_like(low)


def _round_to_4_bits(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of 4 bits, the first of two in the lower half of a byte."""
    low, high = _range(values)
    if values.shape[-1] == _SMALLEST:
        scales = _half((high - low) / 15)
        offsets = low + 8 * scales.float()
        values.sub_(offsets)
    else:
        # The value farthest from 0 becomes -8, whatever its sign: a scale may be negative. Cutting
        # it off a little makes the grid finer, and the error of normal weights 3 % smaller.
        scales = _half(torch.where(-low > high, low, high) / -8.6)
        offsets = torch.zeros_like(low)
    integers = values.div_(scales.float()).round_().clamp_(-8, 7).to(torch.int8)
    pairs = integers.view(torch.int16)
    return pairs & 0x0F | pairs >> 4 & 0xF0, scales, offsets


def _range(values: Tensor) -> tuple[Tensor, Tensor]:
    # torch's aminmax takes four times as long.
    return values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)


def _half(scales: Tensor) -> Tensor:
    return torch.where(scales.abs() < _SMALLEST_SCALE, _SMALLEST_SCALE, scales).half()


def _compile(weights: Sequence[_Quantized]) -> Any:
    """A request of OpenVINO that multiplies float32 rows by the transposes of weights."""
    columns = weights[0].columns
    x = ops.parameter([-1, columns], np.float32)
    properties = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Other threads of the process compute too, and a pinned one would wait for its processor.
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(weights[0].shape[2]),
    }
    model = openvino.Model([_result(x, weight) for weight in weights], [x])
    return _core().compile_model(model, "CPU", properties).create_infer_request()


def _result(x: Any, weight: _Quantized) -> Any:
    rows, groups, group = weight.shape
    kind = openvino.Type.i4 if weight.bits == 4 else openvino.Type.i8
    integers = openvino.Tensor(weight.integers, openvino.Shape(weight.shape), kind)
    y = _product(x, integers, weight.scales, rows)
    if not weight.offsets.any():
        return y
    # An offset multiplies the sum of its group's inputs.
    sums = ops.reduce_sum(ops.reshape(x, np.array([-1, groups, group]), False), np.array([2]))
    offsets = np.nan_to_num(weight.offsets)
    largest = np.abs(offsets).max(1, keepdims=True)
    scales = np.maximum(largest / 127, _SMALLEST_SCALE).astype(np.float16)
    rounded = np.rint(offsets / scales).clip(-127, 127).astype(np.int8)
    return ops.add(y, _product(sums, rounded, scales, rows))


def _product(x: Any, integers: Any, scales: NDArray[Any], rows: int) -> Any:
    constant = ops.convert(ops.constant(integers, shared_memory=True), openvino.Type.f16)
    weight = ops.multiply(constant, ops.constant(scales, shared_memory=True))
    flat = ops.reshape(weight, np.array([rows, -1]), False)
    return ops.matmul(x, ops.convert(flat, openvino.Type.f32), False, True)


@cache
def _core() -> openvino.Core:
    return openvino.Core()


def _shared(values: Tensor) -> openvino.Tensor:
    return openvino.Tensor(values.numpy(), shared_memory=True)


@cache
def _nothing(size: int) -> openvino.Tensor:
    return _shared(torch.zeros(1, size, dtype=torch.float32))


def _group(columns: int, bits: int) -> int:
    groups = (_SMALLEST,) if bits == 4 and columns < _SHORT else _GROUPS
    return next((group for group in groups if columns % group == 0), 0)


def can_quantize(module: nn.Module) -> bool:
    """Whether a module is a linear layer that is worth quantizing."""
    # A subclass may compute something else.
    return (
        type(module) is nn.Linear
        and module.weight.numel() >= WORTH_QUANTIZING
        and _group(module.in_features, 4) > 0
    )


def bits_of(module: nn.Module, model: Any, bits: int) -> int:
    """Bits of a layer's integers: the output layer has 8, because its rounding is seen at once."""
    return 8 if module is model.get_output_embeddings() else bits


def quantize_linears(model: Any, bits: int) -> None:
    """Replace a model's linear layers in place with integers, where it is worth it."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if can_quantize(module):
            model.set_submodule(name, IntegerLinear(module, bits_of(module, model, bits)))
    for module in list(model.modules()):
        compile_products(module)
    for module in model.modules():
        if isinstance(module, IntegerLinear) and module.product is not None:
            module.product.result()


def compile_products(module: nn.Module) -> None:
    """Start to compile a module's products of which all layers are integers, on other threads.

    Layers of a module that read the same rows share a product. OpenVINO compiles it on one thread,
    so that other layers can be read and compiled at the same time.
    """
    children: list[tuple[str, Any]] = [
        (name, child)
        for name, child in module.named_children()
        if isinstance(child, IntegerLinear) or can_quantize(child)
    ]
    for _, group in groupby(children, key=lambda child: _reads(*child)):
        layers = [layer for _, layer in group]
        if all(isinstance(layer, IntegerLinear) and layer.product is None for layer in layers):
            product = _pool().submit(_Product, [layer.quantized for layer in layers])
            for place, layer in enumerate(layers):
                layer.compute_with(product, place)


def _reads(name: str, layer: Any) -> tuple[int, str]:
    """Equal for layers of a module that read the same rows."""
    together = (names[0] for names in _TOGETHER if name in names)
    return int(layer.in_features), next(together, name)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads())


def compute_in_float32(model: Any, cache_dtype: torch.dtype) -> None:
    """Change a model in integers to float32, except for its input embedding, which is the largest.

    The products take and give float32, and each layer converted to and from 16 bits otherwise. Few
    rows of the embedding are read.

    Args:
        model: Changed in place; its dtype becomes ``cache_dtype``.
        cache_dtype: The precision of keys and values, which transformers takes from the model's
            dtype. Without bfloat16 instructions 16 bits are slow in attention, too.
    """
    embedding = model.get_input_embeddings()
    stored = embedding.weight.detach()
    # A plain attribute is not converted.
    del embedding.weight
    embedding.weight = stored
    embedding.register_forward_hook(lambda _module, _inputs, rows: rows.float())
    model.float()
    if stored.dtype == cache_dtype:
        # The dtype of a model is that of its first parameter.
        embedding.weight = nn.Parameter(stored, requires_grad=False)
    for module in model.modules():
        if isinstance(module, IntegerLinear):
            module.weight = module.weight.float()
