"""Loading a model with transformers: its pipeline, and the backend that batches it."""

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msgspec import structs

from app.core.config import ModelSettings
from app.core.logging import get_logger
from app.llm.models.description import (
    chat_template,
    context_length,
    fixed_rope_limit,
    load_tokenizer,
    pretrained_source,
    read_gguf,
    special_tokens,
)
from app.llm.models.gguf_header import GgufHeader
from app.llm.models.gguf_tokenizer import end_token_ids
from app.llm.models.load_errors import (
    explaining,
    is_out_of_memory,
    one_line,
    quantization_method,
)
from app.llm.models.progress import Progress
from app.llm.models.recommended_sampling import recommended_sampling
from app.llm.models.snapshot import Snapshot
from app.llm.protocol import REQUEST_FEATURES, SAMPLING_FIELDS, Backend, EngineInfo
from app.utils.errors import ModelLoadError

if TYPE_CHECKING:
    import torch
    from transformers import Pipeline, PreTrainedModel

log = get_logger("engine")

_SUMMED_AT_ONCE = 1 << 22


def load_transformers(
    settings: ModelSettings,
    snapshot: Snapshot,
    reason: str,
    *,
    max_running: int,
    progress: Progress,
) -> Backend:
    """Load safetensors or a GGUF file.

    Args:
        settings: The ``model`` section.
        snapshot: The model's files.
        reason: Why transformers runs it, for /status.
        max_running: Most requests in a batch.
        progress: Called with each step of loading.

    Raises:
        ModelLoadError: Its files are incomplete, or transformers cannot run such a model.
    """
    progress(what := f"loading {settings.label} with transformers")
    header = read_gguf(settings, snapshot) if snapshot.gguf else None
    on_cuda = settings.device == "cuda"
    bits = 0
    if not on_cuda:
        bits, why = choose_bits(settings, snapshot, header, max_running)
        log.info("%s", why)
        if bits:
            reason = f"{reason}; {why}"
    # It imports transformers, which takes seconds.
    from app.llm.engine.transformers.tensor_progress import counting_tensors

    with counting_tensors(what, progress):
        pipe = load_pipeline(settings, snapshot, header, bits)
    progress("starting continuous batching")
    import torch

    model, tokenizer = pipe.model, pipe.tokenizer
    if not on_cuda:
        _replace_linears(model, bits, weight_dtype(settings, snapshot))
    supported = frozenset((*SAMPLING_FIELDS, *REQUEST_FEATURES))
    info = EngineInfo(
        model=settings.label,
        revision=snapshot.revision,
        backend="transformers",
        backend_reason=reason,
        device=f"cuda ({torch.cuda.get_device_name()})" if on_cuda else "cpu",
        dtype=f"int{bits}" if bits else str(model.dtype).removeprefix("torch."),
        context_length=context_length(model.config),
        vocabulary_size=int(model.config.get_text_config().vocab_size),
        supported=supported,
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        chat_template=chat_template(tokenizer),
        special_tokens=special_tokens(tokenizer),
        sampling=recommended_sampling(snapshot, header, supported),
    )
    with explaining("engine", settings, snapshot):
        return _start(pipe, info, snapshot, max_running, settings.cuda_memory_share)


def choose_bits(
    settings: ModelSettings, snapshot: Snapshot, header: GgufHeader | None, max_running: int
) -> tuple[int, str]:
    """Bits of the weights' integers on a CPU, 0 for none, and the reason.

    Raises:
        ModelLoadError: The weights do not fit into the free memory.
    """
    from app.llm.engine.transformers.weights import choose_weights_precision

    dtype: Any = weight_dtype(settings, snapshot)
    choice = choose_weights_precision(
        *(settings, snapshot, header), max_running=max_running, weight_bytes=dtype.itemsize
    )
    name = f"int{choice.bits}" if choice.bits else str(dtype).removeprefix("torch.")
    why = f"weights are {name}, since {choice.reason}"
    return choice.bits, why


def _replace_linears(model: Any, bits: int, dtype: Any) -> None:
    """Replace the linear layers that loading has left, the output layer for one.

    A model in integers computes the rest in float32, and keeps keys and values in ``dtype``.
    """
    from app.llm.engine.transformers.cpu_linear import pack_linears

    if bits:
        from app.llm.engine.transformers.integer_linear import compute_in_float32, quantize_linears

        quantize_linears(model, bits)
        compute_in_float32(model, dtype)
    else:
        pack_linears(model, model.dtype)


def _start(
    pipe: "Pipeline", info: EngineInfo, snapshot: Snapshot, max_running: int, memory_share: float
) -> Backend:
    """Start the paged backend where it is right, else the plain one.

    Raises:
        Exception: Neither is.
    """
    import torch

    from app.llm.engine.transformers.attention_choice import attention_of
    from app.llm.engine.transformers.backend import TransformersBackend
    from app.llm.engine.transformers.plain import PlainBackend
    from app.llm.engine.transformers.start_check import StartCheck, known_as

    model, usual = pipe.model, attention_of(pipe.model)
    limits: dict[str, Any] = {"max_running": max_running, "cuda_memory_share": memory_share}
    check = StartCheck(model, known_as(model, info, snapshot))
    if (reason := _why_not_paged(model, info.context_length)) is None:
        check.prepare("paged")
        paged: Backend | None = None
        try:
            paged = TransformersBackend(pipe, info, **limits)
            if check.passes("paged", paged):
                return paged
            reason = "the paged cache gives other tokens than model.generate"
        except Exception as error:
            if isinstance(error, ModelLoadError) or is_out_of_memory(error):
                raise
            reason = "the paged cache cannot run it"
            log.warning("%s: %s", reason, one_line(error)[:200])
        # Its cache has taken its share of the memory.
        del paged
        gc.collect()
        torch.cuda.empty_cache()
        model.set_attn_implementation(usual)
        log.warning("%s: each request gets a cache of its own, which is slower", reason)
    check.prepare("plain")
    reason = f"{info.backend_reason}; each request has a cache of its own, since {reason}"
    plain = PlainBackend(pipe, structs.replace(info, backend_reason=reason), **limits)
    with plain.reading_short_pieces():
        if not check.passes("plain", plain):
            raise ValueError(
                "its tokens differ from model.generate; step by step it is not supported"
            )
    return plain


def _why_not_paged(model: "PreTrainedModel", context: int) -> str | None:
    if not model.is_backend_compatible():
        return "its attention does not support a paged cache"
    if fixed_rope_limit(model.config) < context:
        return "its rotary embedding depends on the longest text of a batch"
    return None


def check_device(settings: ModelSettings) -> None:
    """Check that the device exists before gigabytes are downloaded for it.

    Raises:
        ModelLoadError: It does not exist.
    """
    if settings.device == "cpu":
        return
    if settings.quantization in {"int8", "int4"}:
        raise ModelLoadError(
            f"model.quantization is {settings.quantization}, which only a CPU runs: set "
            "MODEL__QUANTIZATION=auto"
        )
    import torch

    if not torch.cuda.is_available():
        raise ModelLoadError(
            "model.device is cuda, but this machine has no CUDA device that torch can use: "
            "set MODEL__DEVICE=cpu"
        )


def load_pipeline(
    settings: ModelSettings, snapshot: Snapshot, header: GgufHeader | None, bits: int = 0
) -> "Pipeline":
    """Read a model's weights and tokenizer; ``header`` is its GGUF file's.

    ``bits`` are those of the integers that safetensors become while they are read; 0 is none.

    Raises:
        ModelLoadError: They cannot be read, or this kind of model cannot be served.
    """
    import torch
    from transformers import AutoConfig, GgufConfig
    from transformers.utils import logging as transformers_logging

    # The library's messages go to our log; by default it writes to standard error.
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    weights: dict[str, Any] = {"dtype": weight_dtype(settings, snapshot)}
    if bits and settings.dtype == "auto":
        # What becomes no integers keeps 16 bits, see compute_in_float32().
        weights["dtype"] = torch.bfloat16
    if header is None or snapshot.gguf is None:
        weights["use_safetensors"] = True
        if bits and quantization_method(snapshot) is None:
            from app.llm.engine.transformers.integer_loading import IntegerConfig

            weights["quantization_config"] = IntegerConfig(bits)
        return _from_pretrained(settings, snapshot, weights)
    from app.llm.engine.transformers.gguf import GgufModel

    file = GgufModel(snapshot.directory / snapshot.gguf, header)
    with file.read_once():
        with explaining("configuration", settings, snapshot):
            config = AutoConfig.from_pretrained(snapshot.directory, **pretrained_source(snapshot))  # nosec B615
            file.complete(config)
        weights["config"] = config
        unread = file.unread_weights(config, weights["dtype"]) if bits else {}
        if not unread:
            # Otherwise each forward pass on a CPU would dequantize the weights again.
            weights["quantization_config"] = GgufConfig(dequantize=True)
        else:
            from app.llm.engine.transformers.integer_loading import IntegerConfig

            weights |= {"quantization_config": IntegerConfig(bits), **unread}
        pipe = _from_pretrained(settings, snapshot, weights, header, file.check_tensors)
    pipe.model.generation_config.eos_token_id = sorted(end_token_ids(header)) or None
    return pipe


def _from_pretrained(
    settings: ModelSettings,
    snapshot: Snapshot,
    weights: dict[str, Any],
    header: GgufHeader | None = None,
    check: Callable[[Any, dict[str, Any]], None] = lambda *_: None,
) -> "Pipeline":
    from transformers import AutoModelForCausalLM, GgufConfig, pipeline
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    tokenizer = load_tokenizer(settings, snapshot, header)
    with explaining("model", settings, snapshot):
        method = quantization_method(snapshot)
        if method and method not in {*AUTO_QUANTIZER_MAPPING, "bitsandbytes"}:
            # transformers would read the weights as if they were not quantized.
            raise ValueError("transformers does not know this format")
        source = {
            "pretrained_model_name_or_path": snapshot.directory,
            **pretrained_source(snapshot),
        }
        if "state_dict" in weights:
            source = {"pretrained_model_name_or_path": None}
        # The folder is local, see pretrained_source.
        model, report = weights.pop("class", AutoModelForCausalLM).from_pretrained(  # nosec B615
            output_loading_info=True,
            # For a line that names the tensor, see check_weights.
            ignore_mismatched_sizes=True,
            **source,
            **weights,
        )
        if not isinstance(weights.get("quantization_config"), GgufConfig | None):
            # The layers are like others from here on.
            model.hf_quantizer.remove_quantization_config(model)
        if getattr(model.config.get_text_config(), "num_hidden_layers", None) == 0:
            raise ValueError("it has no layers")
        check_weights(settings.label, model, report)
        check(model, report)
        return pipeline("text-generation", model=model, tokenizer=tokenizer, device=settings.device)


def check_weights(name: str, model: Any, report: dict[str, Any]) -> None:
    """Refuse weights that transformers would replace by random numbers, and values that are none.

    Args:
        name: The model's, for the log.
        model: What was loaded.
        report: What ``from_pretrained`` says of the tensors.

    Raises:
        ValueError: It names a tensor.
    """
    import torch

    from app.llm.engine.transformers.pages import forget_pages, is_mapped

    for tensor, found, wanted in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"its tensor {tensor} is {[*found]}, and its configuration says {[*wanted]}"
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{len(missing)} of its tensors are missing, {missing[0]} for one")
    for tensor, weight in model.named_parameters():
        # A sum is as fast as the memory, and has no value where one of the weights has none. It
        # converts 16 bits into a copy, so it takes a piece at a time.
        pieces = weight.detach().reshape(-1).split(_SUMMED_AT_ONCE)
        sums = (piece.sum(dtype=torch.float32).isfinite() for piece in pieces)
        if weight.dtype.itemsize > 1 and not all(sums):
            raise ValueError(f"its tensor {tensor} has infinite values, or NaN, in {weight.dtype}")
        if is_mapped(weight):
            forget_pages(weight)
    for layer, module in model.named_modules():
        if not getattr(module, "is_finite", True):
            raise ValueError(f"its tensor {layer}.weight has infinite values, or NaN")
    if unnamed := sorted(report["unexpected_keys"]):
        log.warning(
            "tensors of %s that its configuration does not name are ignored: %d, such as %s",
            *(name, len(unnamed), unnamed[0]),
        )


def weight_dtype(settings: ModelSettings, snapshot: Snapshot) -> "torch.dtype | str":
    """The precision of the weights, as ``from_pretrained`` takes it."""
    import torch

    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)  # type: ignore[no-any-return]
    if settings.device == "cuda":
        # As stored. A GGUF file would be dequantized to float32.
        return torch.bfloat16 if snapshot.gguf else "auto"
    # Without bfloat16 instructions a CPU converts in each step, which is slower than float32.
    cpu = torch.cpu.get_capabilities()
    return torch.bfloat16 if cpu.get("avx512_bf16") or cpu.get("amx_tile") else torch.float32
