"""Attention over a paged cache, request by request.

transformers lays the tokens of all requests of a step in one row. Its attention for CPUs then lets
every query look at every request's keys and masks the foreign ones away, which costs the square of
the batch. The function here cuts the row apart again: requests that decode are stacked into a few
batches of about the same length, prompts are taken one by one, and no score is computed only to be
thrown away. It also caps scores and keeps to sliding windows, so it runs models that torch's fused
attention cannot, Gemma 2 for one.

A :class:`Plan` says how the row is cut. It is made once a step, for every kind of layer, and
reaches the layers among the keyword arguments of the model's forward pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

NAME: Final = "per_request_paged"
"""What the attention function is called in a model's configuration."""

PLAN: Final = "attention_plans"
"""The forward pass's keyword argument that holds the :class:`Plan` of each kind of layer."""

# Decoding requests share a batch while the longest has at most twice the keys of the shortest;
# below the floor, padding costs less than one more call does.
_LONGEST_TO_SHORTEST = 2
_PADDING_FLOOR = 256


@dataclass(frozen=True, slots=True)
class Piece:
    """Requests of one step that are attended to together, equal in query length.

    Attributes:
        queries: Their places in the row of queries, [requests, query length].
        first_key: Where their keys start in the row of keys, padded request by request.
        keys: Number of keys of each request, padding included.
        mask: 0 where a query may look and minus infinity elsewhere, [requests, 1, query length,
            keys] in the cache's precision; ``None`` where every query sees every key.
    """

    queries: Tensor
    first_key: int
    keys: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Plan:
    """How the row of one kind of layer is cut.

    Attributes:
        pieces: Every request is in one of them.
        read_index: Places in the cache of every piece's keys, one after the other, padding
            included; empty where nothing is read back.
    """

    pieces: list[Piece]
    read_index: Tensor


def make_plan(
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    read_index: Tensor,
    *,
    dtype: torch.dtype,
    window: int | None = None,
) -> Plan:
    """Cut a row of requests into pieces.

    Args:
        query_lengths: New tokens of each request.
        key_lengths: Tokens each may look at, the new ones included and last.
        read_index: Places in the cache of each request's keys, one request after the other; empty
            where all keys are new.
        dtype: Precision of the masks.
        window: Most tokens back that a query may look, itself included; its layers write over
            their cache, so that their reading order must stay as it is.
    """
    starts = [0, *_running_sums(query_lengths)]
    key_starts = [0, *_running_sums(key_lengths)]
    order = list(range(len(query_lengths)))
    if window is None:
        order.sort(key=lambda i: (query_lengths[i] != 1, key_lengths[i]))
    reads = read_index.numel() > 0
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
            indices += [
                _padded(read_index[key_starts[i] : key_starts[i + 1]], longest) for i in group
            ]
    return Plan(pieces, torch.cat(indices) if reads else read_index)


def plan_step(inputs: dict[str, Any], allocators: Mapping[str, Any]) -> None:
    """Add the plan of each kind of layer to the inputs of one step.

    Args:
        inputs: Keyword arguments that transformers' continuous batching made for the model.
        allocators: Its cache allocators, one for each kind of layer.
    """
    query_lengths = _differences(inputs["cu_seq_lens_q"])
    plans = {
        kind: make_plan(
            query_lengths,
            _differences(inputs["cu_seq_lens_k"][kind]),
            inputs["read_index"][allocator.index],
            dtype=allocator.cache_dtype,
            window=getattr(allocator, "sliding_window", None),
        )
        for kind, allocator in allocators.items()
    }
    inputs[PLAN] = plans
    inputs["read_index"] = [plan.read_index for plan in plans.values()]


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
        key: [key-value heads, all keys, head size], laid out as ``plan`` says.
        value: [key-value heads, all keys, value size].
        plan: How the rows are cut.
        scaling: Multiplies the scores; default: head size to the power of -1/2.
        softcap: Scores are bent to stay between this and its negative.

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
        if length == 1:
            # The heads that share keys become queries of one head: nothing is repeated.
            chosen = chosen.reshape(requests, heads // shared, shared, -1)
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
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    scores = torch.tanh(scores / softcap) * softcap
    if causal:
        scores = scores.masked_fill(_future(length, piece.keys, scores.device), -torch.inf)
    elif piece.mask is not None:
        scores = scores + piece.mask
    return torch.softmax(scores, dim=-1).to(value.dtype) @ value


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the interface
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: a batch of one row, [1, heads, tokens, head size]."""
    for feature in ("s_aux", "position_bias"):
        if kwargs.get(feature) is not None:
            raise NotImplementedError(f"attention with {feature} is not supported")
    layer: Any = module.layer_idx
    plan: Plan = kwargs[PLAN][cache.layer_to_allocator[layer].layer_type]
    key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
    output = attend(query[0], key[0], value[0], plan, scaling=scaling, softcap=softcap)
    return output.unsqueeze(0), None


AttentionInterface.register(NAME, _forward)


def _groups(
    order: Sequence[int],
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    *,
    stack: bool,
) -> list[list[int]]:
    """Requests that are attended to together; ``order`` is kept."""
    groups: list[list[int]] = []
    shortest = longest = 0
    for i in order:
        keys = key_lengths[i]
        # A request with nothing in the cache has no key that padding could repeat.
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
    """Which keys come after each query, which are the last of them; bool [queries, keys]."""
    last = torch.arange(keys - queries, keys, device=device).unsqueeze(-1)
    return torch.arange(keys, device=device) > last + shift


def _by_request(row: Tensor, requests: int) -> Tensor:
    """[heads, tokens, size] as [requests, heads, tokens of each, size], without a copy."""
    heads, tokens, size = row.shape
    strides = row.stride()
    shape = (requests, heads, tokens // requests, size)
    return row.as_strided(shape, (strides[1] * (tokens // requests), *strides))


def _padded(index: Tensor, length: int) -> Tensor:
    """``index`` filled up with its first place, which the mask hides there."""
    missing = length - index.numel()
    return torch.cat([index, index[:1].expand(missing)]) if missing else index


def _running_sums(lengths: Sequence[int]) -> list[int]:
    total = 0
    return [total := total + length for length in lengths]


def _differences(cumulative: Tensor) -> list[int]:
    sums = cumulative.tolist()
    return [after - before for before, after in pairwise(sums)]
