"""The transformers backend: continuous batching of a text-generation pipeline's model.

The paged KV cache, the scheduler and prefix sharing are those of transformers' continuous batching.
Its manager would run them on another thread. This backend calls them from the engine's loop, step
by step: a step is one message, a cancellation takes effect before the next step, and no lock is
needed.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from transformers import GenerationConfig, Pipeline
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from app.core.logging import get_logger
from app.llm.engine.cache_size import (
    PROMPT_TOKENS_PER_STEP,
    ROWS_OF_INTEGERS,
    cache_tokens,
)
from app.llm.engine.transformers.attention_choice import (
    PAGE_SIZE,
    attend_per_request,
    attention_of,
    page_size_for,
    prefer_flash_attention,
    runs_on_gpu,
)
from app.llm.engine.transformers.paged_attention import layer_windows, plan_step, whole_contexts
from app.llm.engine.transformers.pages import UnwrittenZeros
from app.llm.engine.transformers.sampling import RequestSampler, choose
from app.llm.engine.transformers.token_masks import GrammarCompiler
from app.llm.models.description import cache_values_per_token, context_length, eos_token_ids
from app.llm.protocol import EngineInfo, EngineStats, FinishReason, GenerationRequest, TokenEvent

log = get_logger("engine")


@dataclass
class _Running:
    """A request in the batch, and how much of its prompt was in the cache."""

    sampler: RequestSampler
    cached_tokens: int | None = None


class TransformersBackend:
    """Any Hugging Face causal language model, on a CPU or a CUDA device.

    Args:
        pipe: A text-generation pipeline; its model is switched to paged attention.
        max_running: Most requests in a batch.
        cuda_memory_share: Share of a GPU's free memory for the KV cache and the tensors of a step.
    """

    def __init__(
        self,
        pipe: Pipeline,
        info: EngineInfo,
        *,
        max_running: int,
        cuda_memory_share: float,
    ) -> None:
        self.info = info
        self._eos = eos_token_ids(pipe.model.generation_config, pipe.tokenizer)
        self._running: dict[str, _Running] = {}
        self._grammars = GrammarCompiler(info.tokenizer_json, info.vocabulary_size, self._eos)
        self._model = pipe.model
        # Without the argument a model computes the logits of every token.
        self._computes_logits_at = "logits_to_keep" in signature(pipe.model.forward).parameters
        config = batching_config(pipe.model, max_running, cuda_memory_share)
        if info.dtype in {"int8", "int4"}:
            # A few rows more than one call takes would read all weights once more.
            config.max_batch_tokens = max(ROWS_OF_INTEGERS, max_running + ROWS_OF_INTEGERS // 2)
        self._batching = self._start_batching(config)
        log.info("attention is %s", attention_of(pipe.model))

    def _start_batching(self, config: ContinuousBatchingConfig) -> Any:
        model = self._model
        prefer_flash_attention(model)
        generation = GenerationConfig(do_sample=False, eos_token_id=sorted(self._eos) or None)
        self._manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=config
        )
        self._plans_attention = attend_per_request(model)
        self._windows = layer_windows(model.config)
        resolved = self._manager.continuous_batching_config
        if resolved.max_blocks_per_request:
            # Flash attention reads the cache in place, for requests of any length.
            resolved.page_size = page_size_for(model)
            resolved.max_blocks_per_request = -(-context_length(model.config) // resolved.page_size)
        # This creates the batch processor; without CUDA graphs it warms nothing up.
        with ExitStack() as making:
            if self._plans_attention:
                making.enter_context(whole_contexts(model.config))
            if not runs_on_gpu(model):
                making.enter_context(UnwrittenZeros())
            self._manager.warmup()
        return self._manager.batch_processor

    def add(self, request: GenerationRequest) -> None:
        """Add a request to the next step's batch; raises ``GrammarError`` if its grammar is bad."""
        self._running[request.id] = _Running(RequestSampler.of(request, self._grammars, self._eos))
        self._manager.add_request(
            request.prompt_token_ids,
            request_id=request.id,
            max_new_tokens=request.max_tokens,
            streaming=True,
            eos_token_id=sorted(self._eos),
        )

    def cancel(self, request_id: str) -> None:
        """Free a request's slot and its cache pages before the next step."""
        if self._running.pop(request_id, None):
            self._manager.cancel_request(request_id)

    def step(self) -> list[TokenEvent]:
        """Run one forward pass over all running requests and a chunk of the waiting prompts."""
        with torch.inference_mode():
            if self._batching.prepare_next_batch():
                self._compute()
                self._batching.update_batch()
        outputs = self._manager.output_router.output_queue
        return [self._event(outputs.get()) for _ in range(outputs.qsize())]

    def _compute(self) -> None:
        """Run the model on the prepared batch and write the next tokens into it."""
        batch = self._batching.inputs_and_outputs
        inputs = batch.get_model_kwargs()
        if self._plans_attention:
            plan_step(inputs, self._batching.cache.dtype, self._windows)
        samplers = []
        for scheduled in batch.requests_in_batch:
            running = self._running[scheduled.state.request_id]
            if running.cached_tokens is None:
                running.cached_tokens = scheduled.state.position_offset - scheduled.query_length
            if scheduled.has_new_token:
                samplers.append(running.sampler)
        # The other rows belong to prompts of which only a chunk has been read.
        rows = len(samplers)
        places = inputs["logits_indices"][:rows]
        if self._computes_logits_at:
            logits = self._model(**inputs, logits_to_keep=places).logits[0]
        else:
            logits = self._model(**inputs).logits[0, places]
        if samplers:
            batch.output_ids[0, :rows] = choose(logits.float(), samplers)

    def _event(self, output: GenerationOutput) -> TokenEvent:
        running = self._running[output.request_id]
        new = output.generated_tokens[running.sampler.sent :]
        finish: FinishReason | None = None
        if output.status == RequestStatus.FAILED:
            finish = "error"
        elif output.status == RequestStatus.FINISHED:
            finish = "stop" if new and new[-1] in self._eos else "length"
        cached = running.cached_tokens or 0
        event = running.sampler.event(
            output.request_id, new, finish, error=output.error, cached_tokens=cached
        )
        if event.finish_reason is not None:
            del self._running[output.request_id]
        if event.finish_reason == "error" and output.status != RequestStatus.FAILED:
            self._manager.cancel_request(output.request_id)
        return event

    def has_work(self) -> bool:
        """Whether a request is unfinished, or a cancelled one still has cache pages."""
        return bool(self._running) or self._batching.has_pending_requests()

    def stats(self) -> EngineStats:
        """Figures of the moment."""
        return EngineStats(
            running=len(self._running),
            kv_cache_usage=1.0 - float(self._batching.cache.compute_free_capacity()),
        )


def batching_config(
    model: Any, max_running: int, cuda_memory_share: float
) -> ContinuousBatchingConfig:
    """The settings of transformers' continuous batching, for the model's device."""
    on_gpu = runs_on_gpu(model)
    return ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        num_blocks=None if on_gpu else _cpu_blocks(model, max_running),
        max_batch_tokens=None if on_gpu else PROMPT_TOKENS_PER_STEP + max_running,
        max_memory_percent=cuda_memory_share if on_gpu else None,
        max_requests_per_batch=max_running,
        # A CUDA graph would include the choice of tokens, which is Python code and differs by step.
        use_cuda_graph=False,
        # Penalties and grammars need the tokens of the previous step.
        use_async_batching=False,
        # prefer_flash_attention() has switched already.
        auto_switch_to_flash=False,
    )


def _cpu_blocks(model: Any, max_running: int) -> int:
    tokens = cache_tokens(
        context_length=context_length(model.config),
        max_running=max_running,
        bytes_per_token=cache_values_per_token(model.config) * model.dtype.itemsize,
    )
    return -(-tokens // PAGE_SIZE) + 1
