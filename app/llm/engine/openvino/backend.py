"""The openvino backend: OpenVINO GenAI's continuous batching on a CPU, called step by step.

Batching, the paged KV cache, prefix sharing and sampling are native code of the library. ``step()``
holds the interpreter lock until it returns, which is one reason for the engine process.
"""

import itertools
import random
import sys
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import openvino
import openvino_genai
from openvino_genai import GenerationConfig, GenerationFinishReason, GenerationStatus

from app.llm.engine.cache_size import PROMPT_TOKENS_PER_STEP
from app.llm.engine.openvino.grammars import GrammarCompiler
from app.llm.engine.openvino.shared_blocks import SharedBlocks, Writer, exclude
from app.llm.prefix_index import PrefixIndex
from app.llm.protocol import (
    SAMPLING_FIELDS,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationRequest,
    TokenEvent,
)

SUPPORTED: Final = frozenset((*SAMPLING_FIELDS, "logprobs", "grammar")) - {"logit_bias"}
"""What the library supports. It returns the log-probability of the chosen token only."""

# The library requires min_p below 1. The next smaller float32 also keeps only the likeliest tokens.
_LARGEST_MIN_P = 1 - 2**-24
_FINISH_REASONS: dict[GenerationFinishReason, FinishReason] = {
    GenerationFinishReason.STOP: "stop",
    GenerationFinishReason.LENGTH: "length",
}


@dataclass
class _Running:
    """A request, with a handle once the pipeline has it.

    The library ends a request when its handle is deleted.
    """

    request: GenerationRequest
    writer: Writer
    config: GenerationConfig
    handle: Any = None
    cached_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)


def start_pipeline(
    model_path: str,
    *,
    tokenizer: openvino_genai.Tokenizer | None,
    max_running: int,
    cache_blocks: int,
    properties: dict[str, Any],
) -> openvino_genai.ContinuousBatchingPipeline:
    """Load and compile a model.

    Args:
        model_path: A GGUF file, or a folder with ``openvino_model.xml``.
        tokenizer: Has the vocabulary for grammars; ``None``: the library reads its own.
        max_running: Most requests in a batch.
        cache_blocks: Size of the KV cache in blocks of ``prefix_index.BLOCK_SIZE`` tokens.
        properties: Properties of the CPU plugin, such as ``INFERENCE_PRECISION_HINT``.

    Raises:
        RuntimeError: The library cannot read or compile the model.
    """
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = cache_blocks
    scheduler.enable_prefix_caching = True
    scheduler.dynamic_split_fuse = True
    scheduler.max_num_seqs = max_running
    scheduler.max_num_batched_tokens = PROMPT_TOKENS_PER_STEP + max_running
    if tokenizer is None:
        return openvino_genai.ContinuousBatchingPipeline(model_path, scheduler, "CPU", properties)
    return openvino_genai.ContinuousBatchingPipeline(
        model_path, tokenizer, scheduler, "CPU", **properties
    )


class OpenVinoBackend:
    """A GGUF file or an OpenVINO model on a CPU.

    Args:
        eos_token_ids: Tokens that end an answer.
        cache_blocks: Size of the KV cache, as for :func:`start_pipeline`.
    """

    def __init__(
        self,
        pipeline: openvino_genai.ContinuousBatchingPipeline,
        info: EngineInfo,
        *,
        eos_token_ids: frozenset[int],
        cache_blocks: int,
    ) -> None:
        self.info = info
        self._pipeline = pipeline
        self._eos = eos_token_ids
        self._prefixes = PrefixIndex(cache_blocks)
        self._blocks = SharedBlocks(cache_blocks)
        self._running: dict[str, _Running] = {}
        self._held: dict[str, _Running] = {}
        self._cancelled: list[_Running] = []
        self._grammars = GrammarCompiler(
            pipeline.get_tokenizer(), info.vocabulary_size, eos_token_ids
        )
        self._added = 0

    def add(self, request: GenerationRequest) -> None:
        """Add a request to a next step's batch; raises what the library or a grammar rejects."""
        config = self._config(request)
        added = _Running(request, self._blocks.writer(request.prompt_token_ids), config)
        if self._must_wait(added):
            self._held[request.id] = added
        else:
            self._start(added)

    def _must_wait(self, asked: _Running) -> bool:
        earlier = itertools.takewhile(lambda held: held is not asked, self._held.values())
        return any(
            exclude(asked.writer, other.writer)
            for other in itertools.chain(self._running.values(), self._cancelled, earlier)
        )

    def _start(self, running: _Running) -> None:
        tokens = running.request.prompt_token_ids
        self._added += 1
        prompt = openvino.Tensor(np.array([tokens], dtype=np.int64))
        running.cached_tokens = self._prefixes.find(tokens)
        running.handle = self._pipeline.add_request(self._added, prompt, running.config)
        self._running[running.request.id] = running

    def _config(self, request: GenerationRequest) -> GenerationConfig:
        sampling = request.sampling
        config = GenerationConfig()
        # The prompt has been rendered with the chat template already.
        config.apply_chat_template = False
        config.max_new_tokens = request.max_tokens
        config.min_new_tokens = min(sampling.min_tokens, request.max_tokens)
        if self._eos:
            config.eos_token_id = min(self._eos)
            config.stop_token_ids = set(self._eos)
        config.logprobs = int(request.logprobs)
        config.repetition_penalty = sampling.repetition_penalty
        config.presence_penalty = sampling.presence_penalty
        config.frequency_penalty = sampling.frequency_penalty
        config.do_sample = not sampling.is_greedy
        if config.do_sample:
            config.temperature = sampling.temperature
            config.top_p = sampling.top_p
            config.min_p = min(sampling.min_p, _LARGEST_MIN_P)
            config.top_k = sampling.top_k or sys.maxsize
            # The library's seed has 32 bits, and its default is always the same.
            seed = random.getrandbits(32) if sampling.seed is None else sampling.seed  # nosec B311
            config.rng_seed = seed % 2**32
        if request.grammar is not None:
            config.structured_output_config = self._grammars.compile(request.grammar)
        return config

    def cancel(self, request_id: str) -> None:
        """Free a request's slot and its cache blocks in the next step."""
        self._held.pop(request_id, None)
        if running := self._running.pop(request_id, None):
            running.handle.cancel()
            self._blocks.ended(running.writer, running.token_ids)
            self._cancelled.append(running)

    def step(self) -> list[TokenEvent]:
        """Run one forward pass over all running requests and a chunk of the waiting prompts."""
        rejected = self._start_held()
        self._pipeline.step()
        self._cancelled.clear()
        events = [self._event(running) for running in list(self._running.values())]
        return [*rejected, *(event for event in events if event is not None)]

    def _start_held(self) -> list[TokenEvent]:
        """Start the held requests that may run now; returns an event for each rejected."""
        rejected = []
        for name, held in list(self._held.items()):
            if not self._must_wait(held):
                del self._held[name]
                try:
                    self._start(held)
                except RuntimeError as error:
                    kind = type(error).__name__
                    rejected.append(TokenEvent(request_id=name, finish_reason="error", error=kind))
        return rejected

    def _event(self, running: _Running) -> TokenEvent | None:
        """The step's event for a request; ``None`` while its prompt is being read."""
        new: list[int] = []
        logprobs: list[float] = []
        finish: FinishReason | None = None
        while running.handle.can_read():
            # A request has one sequence, so each read has one output.
            for output in running.handle.read().values():
                new += output.generated_ids
                logprobs += output.generated_log_probs
                finish = _FINISH_REASONS.get(output.finish_reason, finish)
        error = None
        if finish is None and running.handle.get_status() == GenerationStatus.IGNORED:
            finish, error = "error", "the KV cache has no room for it"
        if not new and finish is None:
            return None
        first = not running.token_ids
        running.token_ids += new
        request = running.request
        running.writer.length = len(request.prompt_token_ids) + len(running.token_ids)
        if first:
            self._prefixes.add(request.prompt_token_ids)
        if finish is not None:
            del self._running[request.id]
            self._blocks.ended(running.writer, running.token_ids)
            self._prefixes.add([*request.prompt_token_ids, *running.token_ids])
        return TokenEvent(
            request_id=request.id,
            token_ids=new,
            logprobs=logprobs if request.logprobs else [],
            finish_reason=finish,
            error=error,
            cached_tokens=running.cached_tokens if first else 0,
        )

    def has_work(self) -> bool:
        """Whether a request is unfinished, or a cancelled one still has cache blocks."""
        return bool(self._held) or bool(self._pipeline.has_non_finished_requests())

    def stats(self) -> EngineStats:
        """Figures of the moment."""
        if not self._running:
            return EngineStats()
        usage = self._pipeline.get_metrics().cache_usage / 100
        return EngineStats(running=len(self._running), kv_cache_usage=usage)
