"""A model that makes its own cache, as every model of transformers does in ``generate``."""

from inspect import signature
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from app.llm.models.description import fixed_rope_limit

Cache = dict[str, Any]
"""Keyword arguments of the forward pass that hold what it has read; empty before the first pass."""

# The names under which models return their caches, and under which they take them again.
_NAMES: Final = {
    "past_key_values": "past_key_values",
    "cache_params": "cache_params",
    "state": "state",
    "mems": "past_key_values",
    "past_buckets_states": "past_key_values",
}
# Lengths of two texts, from which the size of a cache is computed.
_PROBES: Final = (8, 16)


class CachingModel:
    """Runs a model step by step, and knows what can be done with its cache.

    Attributes:
        piece_limit: Length up to which a text may be read in pieces. It is 0 where a cache takes
            one token at a time, as those of recurrent layers do.
        has_rows: Whether several texts of one length can share a cache, and leave it.
        can_crop: Whether the last tokens can be removed from the cache.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        takes = signature(model.forward).parameters
        # Without the argument a model computes the logits of every token.
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._takes_positions = "position_ids" in takes
        short, long = (self._probe(length, length, {}) for length in _PROBES)
        sizes = [sum(t.nbytes for t in _tensors(cache, set())) for cache in (short, long)]
        self._token_bytes = (sizes[1] - sizes[0]) / (_PROBES[1] - _PROBES[0])
        self._fixed_bytes = max(0.0, sizes[0] - self._token_bytes * _PROBES[0])
        caches = list(long.values())
        self.has_rows = bool(caches) and all(type(cache) is DynamicCache for cache in caches)
        layers = [layer for c in caches for layer in c.layers] if self.has_rows else [None]
        kinds = {type(layer) for layer in layers}
        known = kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
        in_pieces = known and self._reads_piece(short)
        self.piece_limit = fixed_rope_limit(model.config) if in_pieces else 0.0
        if getattr(model.config.get_text_config(decoder=True), "layer_types", None) is None:
            # The cache guesses which layers have the window, and drops tokens that the others see.
            windows = [x.sliding_window for x in layers if isinstance(x, DynamicSlidingWindowLayer)]
            self.piece_limit = min([self.piece_limit, *windows])
        self.can_crop = kinds <= {DynamicLayer}

    def _probe(self, length: int, count: int, cache: Cache) -> Cache:
        ids = torch.zeros((1, length), dtype=torch.long, device=self._model.device)
        with torch.inference_mode():
            return self.forward(ids, count, cache)[1]

    def _reads_piece(self, cache: Cache) -> bool:
        try:
            self._probe(_PROBES[1], _PROBES[1] - _PROBES[0], cache)
        except AssertionError:
            # The model adds one token at a time.
            return False
        return True

    def size(self, length: int) -> float:
        """Bytes that the cache takes for one text of so many tokens."""
        return self._fixed_bytes + self._token_bytes * length

    def forward(self, ids: Tensor, count: int, cache: Cache) -> tuple[Tensor, Cache]:
        """Read the last tokens of texts of one length.

        Args:
            ids: The whole texts, int64 [texts, tokens].
            count: How many tokens are not in the cache; all where it is empty.
            cache: Of the tokens before.

        Returns:
            Logits after the last token, float32 [texts, vocabulary], and the cache for the next
            call. It stays empty where the model has none.
        """
        arguments = cache | self._options
        inputs = self._model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=count if cache else None,
            attention_mask=torch.ones_like(ids),
            use_cache=True,
            is_first_iteration=not cache,
            **arguments,
        )
        if self._takes_positions and cache and inputs.get("position_ids") is None:
            # Only from the beginning does every model count by itself.
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            inputs["position_ids"] = positions[:, -inputs["input_ids"].shape[1] :]
        output = self._model(**inputs, return_dict=True)
        returned = {
            argument: output[name]
            for name, argument in _NAMES.items()
            if output.get(name) is not None
        }
        return output.logits[:, -1].float(), returned


def _tensors(value: Any, seen: set[int]) -> list[Tensor]:
    """The different tensors in an object, in its attributes, lists and dictionaries."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    return [tensor for part in parts for tensor in _tensors(part, seen)]
