"""How a model's authors recommend to sample, in generation_config.json or a GGUF file's header."""

from collections.abc import Collection
from typing import Any, Final

import msgspec

from app.core.logging import get_logger
from app.llm.models.gguf_header import GgufHeader
from app.llm.models.snapshot import Snapshot
from app.llm.protocol import NEUTRAL_SAMPLING

log = get_logger("engine")

# The keys of GGUF, and the range that a request may ask for.
_FIELDS: Final = {
    "temperature": ("temp", 0, 2),
    "top_p": ("top_p", 0, 1),
    "top_k": ("top_k", 0, 1_000_000),
    "min_p": ("min_p", 0, 1),
    "repetition_penalty": ("penalty_repeat", 0, 2),
}
_ABOVE_ZERO = ("top_p", "repetition_penalty")

DEFAULT_SAMPLING: Final = {name: getattr(NEUTRAL_SAMPLING, name) for name in _FIELDS}
"""The fields that a model's authors may recommend, and what changes nothing."""


def recommended_sampling(
    snapshot: Snapshot, header: GgufHeader | None, supported: Collection[str]
) -> dict[str, float]:
    """The recommended values by the names of :class:`~app.llm.protocol.SamplingParams`.

    As in vLLM, ``do_sample`` is not looked at. What no request may ask for, or the engine does not
    support, is left out with a warning.
    """
    named = _named(snapshot, header)
    values: dict[str, float] = {}
    for name, (_, least, most) in _FIELDS.items():
        value = named.get(name)
        if name == "top_k" and value == -1:
            value = 0
        if value is None or value == DEFAULT_SAMPLING[name]:
            continue
        if name not in supported:
            log.warning("the model recommends %s, which this engine does not support", name)
        elif (
            type(value) in (int, float)
            and least <= value <= most
            and not (name in _ABOVE_ZERO and value == 0)
            and not (name == "top_k" and value % 1)
        ):
            values[name] = int(value) if name == "top_k" else float(value)
        else:
            log.warning("the model recommends %s %.40r, which is not possible", name, value)
    return values


def _named(snapshot: Snapshot, header: GgufHeader | None) -> dict[str, Any]:
    if header is not None:
        keys = {name: f"general.sampling.{key}" for name, (key, *_) in _FIELDS.items()}
        return {name: header.metadata.get(key) for name, key in keys.items()}
    try:
        text = (snapshot.directory / "generation_config.json").read_bytes()
        return msgspec.json.decode(text, type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        # The libraries read the file too, and say what is wrong with it.
        return {}
