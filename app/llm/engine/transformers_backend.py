"""The transformers backend: a text-generation pipeline whose model is batched continuously.

transformers' continuous batching brings the paged KV cache, the scheduler and prefix sharing.
Its manager would run them on a thread of its own and queue one object per request and token;
this backend drives the same parts step by step from the engine's loop instead, so that a step
is one message, a cancellation takes effect before the next step, and nothing waits on a lock.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, Pipeline
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.generation.logits_process import LogitsProcessorList
from transformers.utils.generic import is_flash_attention_requested

from app.llm.engine import paged_attention
from app.llm.engine.base import (
    EngineInfo,
    EngineStats,
    GenerationRequest,
    TokenEvent,
)
from app.llm.engine.sampling import RequestSampler, select

# Tokens in a page of the KV cache: the grain of prefix sharing, and what a request wastes at most.
_PAGE_SIZE = 32
# Prompt tokens a step takes in beside the running requests; longer prompts come in pieces, so
# that they do not stall the running streams.
_CPU_BATCH_TOKENS = 512
# Tokens of cache planned for each running request on a CPU, where the cache is resident memory
# from the start. A few longer requests are fine; if all are, some wait and are computed again.
_CPU_TOKENS_PER_REQUEST = 1024
# Share of the memory that is free after loading which the KV cache may take on a CPU.
_CPU_CACHE_SHARE = 0.4


class _Selector(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Runs :func:`select` as a logits processor: the place transformers has for one's own."""

    supported_kwargs: ClassVar[dict[str, type]] = {"sampler": RequestSampler}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._samplers: list[RequestSampler] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """No defaults: every request brings its sampler."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Note whose row is which; the tensor itself is not needed."""
        self._samplers = [
            r.state.logit_processor_kwargs["sampler"] for r in requests_with_new_token
        ]
        return torch.zeros(len(self._samplers), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:  # noqa: ARG002 - the interface
        """Choose every row's token."""
        return select(scores, self._samplers)


class _Collector:
    """Stands in for the manager's output router: keeps what a step brought."""

    def __init__(self) -> None:
        self.outputs: list[GenerationOutput] = []

    def deliver(self, output: GenerationOutput) -> None:
        """Keep one output."""
        self.outputs.append(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        """Keep all outputs of a step."""
        self.outputs += outputs

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        """Keep the failure of one request."""
        state.status = RequestStatus.FAILED
        state.error = str(error)
        self.deliver(state.to_generation_output())

    def take(self) -> list[GenerationOutput]:
        """Hand over what was kept."""
        outputs, self.outputs = self.outputs, []
        return outputs


@dataclass
class _Running:
    """How much of a request's answer has been told."""

    sampler: RequestSampler
    told: int = 0
    cached_tokens: int = 0


class TransformersBackend:
    """Any Hugging Face causal language model, on a CPU or a CUDA device."""

    def __init__(self, pipe: Pipeline, info: EngineInfo, *, max_running: int) -> None:
        """Take over a loaded pipeline.

        Args:
            pipe: A text-generation pipeline; its model is moved to paged attention.
            info: What is being served.
            max_running: Requests generated at once.
        """
        self.info = info
        self._eos = _eos_token_ids(pipe)
        self._collector = _Collector()
        self._running: dict[str, _Running] = {}
        self._batching = self._start_batching(pipe.model, max_running)

    def _start_batching(self, model: Any, max_running: int) -> Any:
        on_cpu = model.device.type == "cpu"
        config = ContinuousBatchingConfig(
            page_size=_PAGE_SIZE,
            num_blocks=_cpu_blocks(model, max_running) if on_cpu else None,
            max_batch_tokens=_CPU_BATCH_TOKENS + max_running if on_cpu else None,
            max_requests_per_batch=max_running,
            # The selector reads each request's own parameters in Python, which a captured graph
            # would not repeat and a second batch in flight would mix up.
            use_cuda_graph=False,
            use_async_batching=False,
        )
        generation = GenerationConfig(do_sample=False, eos_token_id=sorted(self._eos) or None)
        self._manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=config
        )
        per_request = attend_per_request(model)
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([_Selector()]))
        processors.tensors_required = 1
        self._manager.logit_processor = processors
        self._manager.output_router = self._collector
        batching = self._manager._create_batch_processor()
        self._manager.batch_processor = batching
        self._count_prefix_hits(batching.cache)
        if per_request:
            plan_attention(batching.inputs_and_outputs, batching.cache)
        return batching

    def _count_prefix_hits(self, cache: Any) -> None:
        search = cache.search_prefix_match

        def counting(request_id: str, tokens: Sequence[int]) -> int:
            hit: int = search(request_id, tokens)
            if running := self._running.get(request_id):
                running.cached_tokens = hit
            return hit

        cache.search_prefix_match = counting

    def add(self, request: GenerationRequest) -> None:
        """Take a request into the next step's batch."""
        sampler = RequestSampler(request.sampling, request.prompt_token_ids)
        self._running[request.id] = _Running(sampler)
        self._manager.add_request(
            request.prompt_token_ids,
            request_id=request.id,
            max_new_tokens=request.max_tokens,
            streaming=True,
            eos_token_id=sorted(self._eos),
            sampler=sampler,
        )

    def cancel(self, request_id: str) -> None:
        """Free a request's place and its pages before the next step."""
        if self._running.pop(request_id, None):
            self._manager.cancel_request(request_id)

    def step(self) -> list[TokenEvent]:
        """One forward pass over every running request and a piece of the waiting prompts."""
        with torch.inference_mode():
            if self._batching.prepare_next_batch():
                self._manager._generation_step()
                self._batching.update_batch()
        events = [self._event(output) for output in self._collector.take()]
        return [event for event in events if event is not None]

    def _event(self, output: GenerationOutput) -> TokenEvent | None:
        running = self._running.get(output.request_id)
        if running is None:
            # Cancelled between scheduling and update; its terminal event has been sent.
            return None
        new = output.generated_tokens[running.told :]
        cached = running.cached_tokens if running.told == 0 else 0
        running.told += len(new)
        running.sampler.generated.update(new)
        finish = None
        if output.status == RequestStatus.FAILED:
            finish = "error"
        elif output.status == RequestStatus.FINISHED:
            finish = "stop" if new and new[-1] in self._eos else "length"
        if finish is not None:
            del self._running[output.request_id]
        return TokenEvent(
            request_id=output.request_id,
            token_ids=new,
            finish_reason=finish,  # type: ignore[arg-type]
            error=output.error,
            cached_tokens=cached,
        )

    def has_work(self) -> bool:
        """Whether any request is unfinished, or a cancelled one still holds pages."""
        return bool(self._running) or self._batching.has_pending_requests()

    def stats(self) -> EngineStats:
        """Figures of the moment."""
        return EngineStats(
            running=len(self._running),
            kv_cache_usage=1.0 - float(self._batching.cache.compute_free_capacity()),
        )


def attend_per_request(model: Any) -> bool:
    """Give a model our attention function where it is the better one; returns whether it was.

    Flash attention, which transformers has chosen by then where it is installed, works request by
    request itself, and a GPU hides the cost of ``sdpa``'s mask.
    """
    chosen = model.config._attn_implementation
    on_gpu = model.device.type != "cpu"
    if is_flash_attention_requested(requested_attention_implementation=chosen) or (
        on_gpu and chosen == "sdpa"
    ):
        return False
    model.set_attn_implementation(paged_attention.NAME)
    return True


def plan_attention(inputs: Any, cache: Any) -> None:
    """Have each step's inputs say how the attention is cut into requests."""
    collect = inputs.get_model_kwargs

    def planned(*args: Any, **options: Any) -> dict[str, Any]:
        kwargs: dict[str, Any] = collect(*args, **options)
        plans = paged_attention.plans_for(kwargs, cache.cache_allocators)
        kwargs[paged_attention.PLAN] = plans
        kwargs["read_index"] = [plans[kind].read_index for kind in cache.cache_allocators]
        return kwargs

    inputs.get_model_kwargs = planned


def _eos_token_ids(pipe: Pipeline) -> frozenset[int]:
    """Tokens that end an answer: the generation config's, and the tokenizer's own."""
    configured = pipe.model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, pipe.tokenizer.eos_token_id) if i is not None)


def context_length(config: Any) -> int:
    """Most tokens of prompt and answer together, from a model's configuration."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else 2048


def _cpu_blocks(model: Any, max_running: int) -> int:
    """Pages for the planned tokens of ``max_running`` requests, within a share of free memory."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    affordable = int(free * _CPU_CACHE_SHARE / bytes_per_token)
    context = context_length(model.config)
    # One whole context is the least: a request that was admitted must be able to finish.
    wanted = max(context, max_running * min(context, _CPU_TOKENS_PER_REQUEST))
    tokens = max(context, min(wanted, affordable))
    return -(-tokens // _PAGE_SIZE) + 1
