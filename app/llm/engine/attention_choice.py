"""Which attention function a model gets: flash attention, ``sdpa``, or our own."""

from typing import Any, Final

from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from app.core.logging import get_logger
from app.llm.engine import paged_attention

log = get_logger("engine")

PAGE_SIZE: Final = 32
"""Tokens in a page of the KV cache: the grain of prefix sharing, and what a request wastes at
most."""

# Flash attention 2 reads a cache where it lies only in pages of a multiple of this.
_FLASH_2_PAGE_SIZE = 256


def runs_on_gpu(model: Any) -> bool:
    """Whether a model's weights are on a CUDA device."""
    return bool(model.device.type == "cuda")


def attention_of(model: Any) -> str:
    """Name of the attention function that a model uses."""
    return str(model.config._attn_implementation)


def prefer_flash_attention(model: Any) -> None:
    """Have a model use flash attention on a GPU, where a package for it is installed.

    transformers would do so for float32 and for models on a CPU too, where it fails, and with its
    package ``kernels`` would rather download compiled code from the hub.
    """
    if not (runs_on_gpu(model) and model.dtype.itemsize == 2):
        return
    for version, is_available in ((3, is_flash_attn_3_available), (2, is_flash_attn_2_available)):
        if is_available():
            try:
                model.set_attn_implementation(f"flash_attention_{version}")
            except (ImportError, ValueError) as error:
                log.warning("flash attention %d cannot be used: %s", version, error)
            else:
                return


def attend_per_request(model: Any) -> bool:
    """Give a model our attention function where it is the better one; returns whether it was.

    Flash attention, which is chosen by then where it is installed, works request by request
    itself, and a GPU hides the cost of ``sdpa``'s mask.
    """
    chosen = attention_of(model)
    if is_flash_attention_requested(requested_attention_implementation=chosen) or (
        runs_on_gpu(model) and chosen == "sdpa"
    ):
        return False
    model.set_attn_implementation(paged_attention.NAME)
    return True


def page_size_for(model: Any) -> int:
    """Tokens in a page of a cache that the model's flash attention reads where it lies."""
    chosen = attention_of(model)
    version_2 = is_flash_attention_requested(requested_attention_implementation=chosen, version=2)
    return _FLASH_2_PAGE_SIZE if version_2 else PAGE_SIZE
