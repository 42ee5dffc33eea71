"""Attention over a paged cache, request by request.

transformers puts the tokens of all requests of a step in one row. Its ``sdpa`` attention computes
the scores of every query against the keys of all requests and masks those of other requests, so its
cost grows with the square of the batch. The function here splits the row: decoding requests of
similar length are batched, and prompts are computed one by one. It also supports capped scores and
sliding windows, so it runs models that torch's fused attention cannot, such as Gemma 2.

A :class:`Plan` says how the row is split. Each step has one for each size of sliding window. The
:class:`StepPlans` are a keyword argument of the model's forward pass.

transformers' own cache of layers with a sliding window shares no prefixes between requests: each
turn of a chat with Gemma would read the whole conversation again. Here all layers keep whole
contexts, and a plan leaves out the keys before the window. Such a layer therefore holds more tokens
than it needs once a context is longer than its window.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

NAME: Final = "per_request_paged"
"""The attention function's name in a model's configuration."""

PLANS: Final = "attention_plans"
"""Keyword argument of the forward pass: the step's :class:`StepPlans`."""

_WHOLE, _SLIDING = "full_attention", "sliding_attention"

# Decoding requests share a batch if the longest has at most twice the keys of the shortest, or no
# more keys than the floor: padding up to it costs less than another call.
_LONGEST_TO_SHORTEST = 2
_PADDING_FLOOR = 256


@dataclass(frozen=True, slots=True)
class Piece:
    """Requests of equal query length that are computed together.

    Attributes:
        queries: Indices of their queries in the row of queries, [requests, query length].
        first_key: Index of their first key in the row of keys.
        keys: Number of keys of each request, including padding.
        mask: Added to the scores, [requests, 1, query length, keys] in the cache's precision: 0
            where a query may see a key, else minus infinity. ``None``: a causal mask is enough.
    """

    queries: Tensor
    first_key: int
    keys: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Plan:
    """How the row is split for the layers with one size of window.

    Attributes:
        pieces: Each request is in one of them.
        read_index: Cache indices of all pieces' keys in order, including padding; empty if nothing
            is read from the cache.
    """

    pieces: list[Piece]
    read_index: Tensor


@dataclass(frozen=True, slots=True)
class StepPlans:
    """The plans of a step, each made for the first layer that needs it.

    Attributes:
        query_lengths: Number of new tokens of each request.
        key_lengths: Number of tokens of each request; the new ones are the last of them.
        read_index: Cache indices of each request's keys, one request after the other; empty if all
            keys are new.
        dtype: Precision of the masks.
        windows: Size of each layer's sliding window, including the query's own token; ``None`` is
            no limit.
        layers: The layers that have had their plan.
    """

    query_lengths: Sequence[int]
    key_lengths: Sequence[int]
    read_index: Tensor
    dtype: torch.dtype
    windows: Sequence[int | None]
    layers: set[int] = field(default_factory=set)
    _plans: dict[int | None, Plan] = field(default_factory=dict)

    def take(self, layer: int) -> Plan:
        """The plan of a layer, which may have it once."""
        self.layers.add(layer)
        window = self.windows[layer]
        if window is not None and max(self.key_lengths) <= window:
            window = None
        if window not in self._plans:
            self._plans[window] = make_plan(
                *(self.query_lengths, self.key_lengths, self.read_index),
                dtype=self.dtype,
                window=window,
            )
        return self._plans[window]


def make_plan(
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    read_index: Tensor,
    *,
    dtype: torch.dtype,
    window: int | None = None,
) -> Plan:
    """Split a row of requests into pieces; the arguments are those of :class:`StepPlans`."""
    starts = [*accumulate(query_lengths, initial=0)]
    key_starts = [*accumulate(key_lengths, initial=0)]
    reads = read_index.numel() > 0
    if reads and window is not None:
        # The first query sees the fewest of the keys before it.
        pairs = zip(query_lengths, key_lengths, strict=True)
        key_lengths = [min(keys, window - 1 + queries) for queries, keys in pairs]
    order = sorted(range(len(query_lengths)), key=lambda i: (query_lengths[i] != 1, key_lengths[i]))
    pieces: list[Piece] = []
    indices: list[Tensor] = []
    first_key = 0
    for group in _groups(order, query_lengths, key_lengths, stack=reads):
        queries, longest = query_lengths[group[0]], max(key_lengths[i] for i in group)
        places = torch.tensor([starts[i] for i in group]).unsqueeze(-1) + torch.arange(queries)
        mask = _mask([key_lengths[i] for i in group], queries, longest, window, dtype)
        device = read_index.device
        pieces.append(
            Piece(
                queries=places.to(device),
                first_key=first_key if reads else key_starts[group[0]],
                keys=longest,
                mask=None if mask is None else mask.to(device),
            )
        )
        first_key += len(group) * longest
        if reads:
            ends = ((key_starts[i + 1], key_lengths[i]) for i in group)
            indices += [_padded(read_index[end - keys : end], longest) for end, keys in ends]
    return Plan(pieces, torch.cat(indices) if reads else read_index)


def layer_windows(config: Any) -> list[int | None]:
    """Size of each layer's sliding window in a model's configuration; ``None`` is no limit."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or [_SLIDING] * text.num_hidden_layers
    return [window if kind == _SLIDING else None for kind in kinds]


@contextmanager
def whole_contexts(config: Any) -> Iterator[None]:
    """While transformers makes the cache, layers with a sliding window count as those without."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.layer_types = [
        _WHOLE if kind == _SLIDING else kind for kind in kinds or [_WHOLE] * text.num_hidden_layers
    ]
    try:
        yield
    finally:
        if kinds is None:
            del text.layer_types
        else:
            text.layer_types = kinds


def plan_step(inputs: dict[str, Any], dtype: torch.dtype, windows: Sequence[int | None]) -> None:
    """Add the plans of one step to the model's inputs.

    Args:
        inputs: The model's keyword arguments from transformers' continuous batching; changed.
        dtype: Precision of the cache.
        windows: Size of each layer's sliding window.
    """
    inputs[PLANS] = StepPlans(
        _differences(inputs["cu_seq_lens_q"]),
        _differences(inputs["cu_seq_lens_k"][_WHOLE]),
        *(inputs["read_index"][0], dtype, windows),
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one layer.

    Args:
        query: [heads, all queries, head size].
        key: [key-value heads, all keys, head size], in the order of ``plan.read_index``.
        value: [key-value heads, all keys, value size], in the same order.
        plan: How the rows are split.
        scaling: Multiplies the scores; default: head size to the power of -1/2.
        softcap: Scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).

    Returns:
        [all queries, heads, value size].
    """
    heads, queries, _ = query.shape
    shared = heads // key.shape[0]
    if scaling is None:
        scaling = float(query.shape[-1]) ** -0.5
    output = query.new_empty(queries, heads, value.shape[-1])
    for piece in plan.pieces:
        requests, length = piece.queries.shape
        place = piece.queries.flatten()
        chosen = _by_request(query.index_select(1, place), requests)
        keys, values = (
            _by_request(row.narrow(1, piece.first_key, requests * piece.keys), requests)
            for row in (key, value)
        )
        if length == 1 or softcap is not None:
            # Heads that share keys become queries of one head, so the keys are not repeated.
            chosen = chosen.reshape(requests, heads // shared, shared * length, -1)
        elif shared > 1:
            keys, values = (row.repeat_interleave(shared, dim=1) for row in (keys, values))
        result = _scores_to_values(chosen, keys, values, piece, length, scaling, softcap)
        result = result.reshape(requests, heads, length, -1).transpose(1, 2)
        output.index_copy_(0, place, result.reshape(requests * length, heads, -1))
    return output


def _scores_to_values(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    piece: Piece,
    length: int,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    causal = piece.mask is None and length > 1
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=piece.mask, is_causal=causal, scale=scaling
        )
    # In bfloat16 a transposed view of keys that are not in order is copied ten times as slowly.
    scores = (query @ key.contiguous().transpose(-1, -2)).float()
    scores.mul_(scaling / softcap).tanh_().mul_(softcap)
    by_query = scores.view(*scores.shape[:2], -1, length, piece.keys)
    if causal:
        by_query.masked_fill_(_future(length, piece.keys, scores.device), -torch.inf)
    elif piece.mask is not None:
        by_query.add_(piece.mask.unsqueeze(1))
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls, with tensors [1, heads, tokens, head size].

    Scores are computed in the precision of the cache, which may be less than the model's.

    Raises:
        NotImplementedError: The layer computes something else than a plan can say. The check at the
            start finds it, and the plain backend runs the model.
    """
    for feature in ("s_aux", "position_bias"):
        if kwargs.get(feature) is not None:
            raise NotImplementedError(f"attention with {feature} is not supported")
    if attention_mask is not None:
        raise NotImplementedError("attention with a mask of its own is not supported")
    layer: Any = module.layer_idx
    plans: StepPlans = kwargs[PLANS]
    if kwargs.get("sliding_window") != plans.windows[layer]:
        # Some models do not apply the window of their configuration.
        raise NotImplementedError("attention with another window is not supported")
    if layer in plans.layers:
        # The second call would replace the keys and values of the first.
        raise NotImplementedError("attention with a layer that runs twice is not supported")
    plan = plans.take(layer)
    computed = query.dtype
    query, key, value = (rows.to(cache.dtype) for rows in (query, key, value))
    reading = kwargs | {"read_index": [plan.read_index]}
    key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=reading)
    output = attend(query[0], key[0], value[0], plan, scaling=scaling, softcap=softcap)
    return output.unsqueeze(0).to(computed), None


AttentionInterface.register(NAME, _forward)


def _groups(
    order: Sequence[int],
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    *,
    stack: bool,
) -> list[list[int]]:
    groups: list[list[int]] = []
    shortest = longest = 0
    for i in order:
        keys = key_lengths[i]
        # A request with one key has nothing in the cache, so no key to pad with.
        stackable = stack and query_lengths[i] == 1 and keys > 1
        low, high = min(shortest, keys), max(longest, keys)
        if stackable and shortest and high <= max(_PADDING_FLOOR, _LONGEST_TO_SHORTEST * low):
            groups[-1].append(i)
            shortest, longest = low, high
        else:
            groups.append([i])
            shortest, longest = (keys, keys) if stackable else (0, 0)
    return groups


def _mask(
    key_lengths: Sequence[int],
    queries: int,
    longest: int,
    window: int | None,
    dtype: torch.dtype,
) -> Tensor | None:
    if queries == 1:
        if min(key_lengths) == longest:
            return None
        hidden = torch.arange(longest) >= torch.tensor(key_lengths).unsqueeze(-1)
        hidden = hidden[:, None, None, :]
    else:
        if longest == queries and (window is None or queries <= window):
            return None
        hidden = _future(queries, longest, torch.device("cpu"))
        if window is not None:
            hidden = hidden | ~_future(queries, longest, hidden.device, shift=-window)
        hidden = hidden[None, None]
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _future(queries: int, keys: int, device: torch.device, shift: int = 0) -> Tensor:
    """Whether a key comes after a query, bool [queries, keys]; the queries are the last keys."""
    last = torch.arange(keys - queries, keys, device=device).unsqueeze(-1)
    return torch.arange(keys, device=device) > last + shift


def _by_request(row: Tensor, requests: int) -> Tensor:
    """View [heads, tokens, size] as [requests, heads, tokens of each, size]."""
    heads, tokens, size = row.shape
    strides = row.stride()
    shape = (requests, heads, tokens // requests, size)
    return row.as_strided(shape, (strides[1] * (tokens // requests), *strides))


def _padded(index: Tensor, length: int) -> Tensor:
    missing = length - index.numel()
    return torch.cat([index, index[:1].expand(missing)]) if missing else index


def _differences(cumulative: Tensor) -> list[int]:
    return [after - before for before, after in pairwise(cumulative.tolist())]
