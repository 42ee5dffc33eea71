"""Chooses a model's attention function: flash attention, ``sdpa`` or our per-request attention."""

from typing import Any, Final

from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from app.core.logging import get_logger
from app.llm.engine.transformers import paged_attention

log = get_logger("engine")

PAGE_SIZE: Final = 32
"""Tokens in a page of the KV cache; prefixes are shared in whole pages."""

# Flash attention 2 reads a paged cache in place only if the page size is a multiple of this.
_FLASH_2_PAGE_SIZE = 256


def runs_on_gpu(model: Any) -> bool:
    """Whether a model's weights are on a CUDA device."""
    return bool(model.device.type == "cuda")


def attention_of(model: Any) -> str:
    """Name of the attention function that a model uses."""
    return str(model.config._attn_implementation)


def prefer_flash_attention(model: Any) -> None:
    """Switch a 16-bit model on a GPU to flash attention if a package for it is installed.

    transformers' own switch also affects models in float32 or on a CPU, where flash attention
    fails. If the package ``kernels`` is installed, it downloads compiled code from the hub.
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
    """Switch a model to per-request attention unless what it has is better; says if it did.

    Flash attention is per-request too, and on a GPU ``sdpa``'s mask costs little.
    """
    chosen = attention_of(model)
    if is_flash_attention_requested(requested_attention_implementation=chosen) or (
        runs_on_gpu(model) and chosen == "sdpa"
    ):
        return False
    model.set_attn_implementation(paged_attention.NAME)
    return True


def page_size_for(model: Any) -> int:
    """Tokens in a cache page if the model's flash attention reads the cache in place."""
    chosen = attention_of(model)
    version_2 = is_flash_attention_requested(requested_attention_implementation=chosen, version=2)
    return _FLASH_2_PAGE_SIZE if version_2 else PAGE_SIZE
