"""The transformers backend: a text-generation pipeline whose model is batched continuously.

transformers' continuous batching brings the paged KV cache, the scheduler and prefix sharing.
Its manager would run them on a thread of its own and queue one object per request and token;
this backend drives the same parts step by step from the engine's loop instead, so that a step
is one message, a cancellation takes effect before the next step, and nothing waits on a lock.
"""

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from transformers import GenerationConfig, Pipeline
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from app.core.logging import get_logger
from app.llm.description import cache_values_per_token, context_length, eos_token_ids
from app.llm.engine.attention_choice import (
    PAGE_SIZE,
    attend_per_request,
    attention_of,
    page_size_for,
    prefer_flash_attention,
    runs_on_gpu,
)
from app.llm.engine.base import (
    EngineInfo,
    EngineStats,
    GenerationRequest,
    TokenEvent,
)
from app.llm.engine.cpu_sizing import PROMPT_TOKENS_PER_STEP, cache_tokens
from app.llm.engine.paged_attention import plan_step
from app.llm.engine.sampling import RequestSampler, choose
from app.llm.engine.token_masks import GrammarCompiler

log = get_logger("engine")


@dataclass
class _Running:
    """How much of a request's answer has been told."""

    sampler: RequestSampler
    told: int = 0
    cached_tokens: int | None = None


class TransformersBackend:
    """Any Hugging Face causal language model, on a CPU or a CUDA device."""

    def __init__(
        self,
        pipe: Pipeline,
        info: EngineInfo,
        *,
        max_running: int,
        cuda_memory_share: float = 0.8,
    ) -> None:
        """Take over a loaded pipeline.

        Args:
            pipe: A text-generation pipeline; its model is moved to paged attention.
            info: What is being served.
            max_running: Requests generated at once.
            cuda_memory_share: Share of a GPU's free memory that the KV cache and the steps' own
                tensors may take.
        """
        self.info = info
        self._eos = eos_token_ids(pipe.model.generation_config, pipe.tokenizer)
        self._running: dict[str, _Running] = {}
        self._grammars = GrammarCompiler(info.tokenizer_json, info.vocabulary_size, self._eos)
        self._model = pipe.model
        # Without the argument a model computes the logits of every token.
        self._computes_logits_at = "logits_to_keep" in signature(pipe.model.forward).parameters
        config = batching_config(pipe.model, max_running, cuda_memory_share)
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
        resolved = self._manager.continuous_batching_config
        if resolved.max_blocks_per_request:
            # Flash attention reads the cache in place, for requests of any length.
            resolved.page_size = page_size_for(model)
            resolved.max_blocks_per_request = -(-context_length(model.config) // resolved.page_size)
        # Without graphs there is nothing to warm up; this makes the batch processor.
        self._manager.warmup()
        return self._manager.batch_processor

    def add(self, request: GenerationRequest) -> None:
        """Take a request into the next step's batch.

        Raises:
            GrammarError: Its grammar cannot be compiled.
        """
        sampler = RequestSampler(
            request.sampling,
            request.prompt_token_ids,
            tells_logprobs=request.logprobs,
            tells_top_logprobs=request.top_logprobs,
            mask=None if request.grammar is None else self._grammars.compile(request.grammar),
        )
        self._running[request.id] = _Running(sampler)
        self._manager.add_request(
            request.prompt_token_ids,
            request_id=request.id,
            max_new_tokens=request.max_tokens,
            streaming=True,
            eos_token_id=sorted(self._eos),
        )

    def cancel(self, request_id: str) -> None:
        """Free a request's place and its pages before the next step."""
        if self._running.pop(request_id, None):
            self._manager.cancel_request(request_id)

    def step(self) -> list[TokenEvent]:
        """One forward pass over every running request and a piece of the waiting prompts."""
        with torch.inference_mode():
            if self._batching.prepare_next_batch():
                self._compute()
                self._batching.update_batch()
        outputs = self._manager.output_router.output_queue
        return [self._event(outputs.get()) for _ in range(outputs.qsize())]

    def _compute(self) -> None:
        """Run the model over the prepared batch, and write the next tokens into it."""
        batch = self._batching.inputs_and_outputs
        inputs = batch.get_model_kwargs()
        if self._plans_attention:
            plan_step(inputs, self._batching.cache.cache_allocators)
        places = inputs["logits_indices"]
        if self._computes_logits_at:
            logits = self._model(**inputs, logits_to_keep=places).logits[0]
        else:
            logits = self._model(**inputs).logits[0, places]
        samplers = []
        for scheduled in batch.requests_in_batch:
            running = self._running[scheduled.state.request_id]
            if running.cached_tokens is None:
                running.cached_tokens = scheduled.state.position_offset - scheduled.query_length
            if scheduled.has_new_token:
                samplers.append(running.sampler)
        if samplers:
            # The rows after theirs belong to prompts that are not finished.
            rows = len(samplers)
            batch.output_ids[0, :rows] = choose(logits[:rows].float(), samplers)

    def _event(self, output: GenerationOutput) -> TokenEvent:
        running = self._running[output.request_id]
        new = output.generated_tokens[running.told :]
        cached = (running.cached_tokens or 0) if running.told == 0 else 0
        running.told += len(new)
        running.sampler.accept(new)
        finish, error = None, output.error
        if output.status == RequestStatus.FAILED:
            finish = "error"
        elif output.status == RequestStatus.FINISHED:
            finish = "stop" if new and new[-1] in self._eos else "length"
        if running.sampler.mask is not None and running.sampler.mask.error:
            finish, error = "error", running.sampler.mask.error
        if finish is not None:
            del self._running[output.request_id]
        if finish == "error" and output.status != RequestStatus.FAILED:
            self._manager.cancel_request(output.request_id)
        told = slice(running.told - len(new), running.told)
        return TokenEvent(
            request_id=output.request_id,
            token_ids=new,
            logprobs=running.sampler.logprobs[told],
            top_logprobs=running.sampler.top_logprobs[told],
            finish_reason=finish,  # type: ignore[arg-type]
            error=error,
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


def batching_config(
    model: Any, max_running: int, cuda_memory_share: float
) -> ContinuousBatchingConfig:
    """What transformers' continuous batching is told; the rest it finds out by itself."""
    on_gpu = runs_on_gpu(model)
    return ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        num_blocks=None if on_gpu else _cpu_blocks(model, max_running),
        max_batch_tokens=None if on_gpu else PROMPT_TOKENS_PER_STEP + max_running,
        max_memory_percent=cuda_memory_share if on_gpu else None,
        max_requests_per_batch=max_running,
        # A graph repeats no Python, which is what chooses the tokens.
        use_cuda_graph=False,
        # Each choice needs the tokens of the step before: penalties and grammars count them.
        use_async_batching=False,
        # prefer_flash_attention() has done so.
        auto_switch_to_flash=False,
    )


def _cpu_blocks(model: Any, max_running: int) -> int:
    """Size of the KV cache, in pages."""
    tokens = cache_tokens(
        context_length=context_length(model.config),
        max_running=max_running,
        bytes_per_token=cache_values_per_token(model.config) * model.dtype.itemsize,
    )
    return -(-tokens // PAGE_SIZE) + 1
