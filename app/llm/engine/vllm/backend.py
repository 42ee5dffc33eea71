"""The vllm backend: vLLM's engine, called step by step in the engine process.

Batching, the paged KV cache, prefix sharing, sampling and grammars are vLLM's. Its scheduler and
model run in this process; with more than one GPU vLLM starts a helper process for each.
"""

import random
from typing import Any, Final

from vllm import LLMEngine, RequestOutput, TokensPrompt
from vllm import SamplingParams as VllmSampling
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from app.llm.ebnf.errors import GrammarError
from app.llm.ebnf.grammars import to_ebnf
from app.llm.protocol import (
    REQUEST_FEATURES,
    SAMPLING_FIELDS,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationRequest,
    Grammar,
    TokenEvent,
)

SUPPORTED: Final = frozenset((*SAMPLING_FIELDS, *REQUEST_FEATURES))
"""vLLM supports every field."""

# The log-probability of what cannot be, as OpenAI has it: JSON has no infinity.
_LEAST_LOGPROB = -9999.0
_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class CacheUsage:
    """Keeps the share of the KV cache in use; it is one of vLLM's loggers of figures."""

    def __init__(self) -> None:
        self.share = 0.0

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        """Take the figures of a step."""
        if scheduler_stats is not None:
            self.share = float(scheduler_stats.kv_cache_usage)

    def log(self) -> None:
        """Nothing is written."""

    def log_engine_initialized(self) -> None:
        """Nothing is written."""


class VllmBackend:
    """A model in safetensors, on one or more CUDA devices or on a CPU.

    Args:
        eos_token_ids: Tokens that end an answer.
        usage: A logger of ``engine``.
    """

    def __init__(
        self,
        engine: LLMEngine,
        info: EngineInfo,
        *,
        eos_token_ids: frozenset[int],
        usage: CacheUsage,
    ) -> None:
        self.info = info
        self._engine = engine
        self._eos = sorted(eos_token_ids)
        self._usage = usage
        # The requests in the batch; the value tells whether one has had its first event.
        self._running: dict[str, tuple[GenerationRequest, bool]] = {}

    def add(self, request: GenerationRequest) -> None:
        """Add a request to the next step's batch; raises ``GrammarError`` if its grammar is bad."""
        prompt = TokensPrompt(prompt_token_ids=request.prompt_token_ids)
        try:
            self._engine.add_request(request.id, prompt, self._sampling(request))
        except ValueError as error:
            if request.grammar is None:
                raise
            raise GrammarError("vLLM refuses it") from error
        self._running[request.id] = (request, False)

    def _sampling(self, request: GenerationRequest) -> VllmSampling:
        asked = request.sampling
        vocabulary = self.info.vocabulary_size
        seed = random.getrandbits(63) if asked.seed is None else asked.seed % 2**63  # nosec B311
        return VllmSampling(
            temperature=0.0 if asked.is_greedy else asked.temperature,
            top_p=asked.top_p,
            top_k=min(asked.top_k, vocabulary),
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logit_bias=asked.logit_bias or None,
            # Without one vLLM would begin with the same numbers after each start.
            seed=None if asked.is_greedy else seed,
            stop_token_ids=self._eos,
            max_tokens=request.max_tokens,
            min_tokens=min(asked.min_tokens, request.max_tokens),
            logprobs=min(request.top_logprobs, vocabulary) if request.logprobs else None,
            structured_outputs=_form(request.grammar) if request.grammar else None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def cancel(self, request_id: str) -> None:
        """Free a request's slot and its cache blocks before the next step."""
        if self._running.pop(request_id, None):
            self._engine.abort_request([request_id])

    def step(self) -> list[TokenEvent]:
        """Run one forward pass over all running requests and a chunk of the waiting prompts."""
        events = [self._event(output) for output in self._engine.step()]
        return [event for event in events if event is not None]

    def _event(self, output: RequestOutput) -> TokenEvent | None:
        """The step's event for a request; ``None`` while its prompt is being read."""
        request, begun = self._running[output.request_id]
        (answer,) = output.outputs
        if not answer.token_ids and answer.finish_reason is None:
            return None
        finish: FinishReason | None = None
        error = None
        if answer.finish_reason is not None:
            del self._running[request.id]
            finish = _FINISH_REASONS.get(answer.finish_reason, "error")
            error = None if finish != "error" else f"vLLM ended it: {answer.finish_reason}"
        elif not begun:
            self._running[request.id] = (request, True)
        tokens = list(answer.token_ids)
        places = (answer.logprobs or []) if request.logprobs else []
        return TokenEvent(
            request_id=request.id,
            token_ids=tokens,
            logprobs=[_finite(place[t]) for t, place in zip(tokens, places, strict=False)],
            top_logprobs=[_likeliest(place, request.top_logprobs) for place in places]
            if request.top_logprobs
            else [],
            finish_reason=finish,
            error=error,
            # vLLM compiles in a thread, and ends a request whose grammar it cannot compile.
            refused=finish == "error" and not begun and request.grammar is not None,
            cached_tokens=0 if begun else output.num_cached_tokens or 0,
        )

    def has_work(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self._engine.has_unfinished_requests())

    def stats(self) -> EngineStats:
        """Figures of the moment."""
        if not self._running:
            return EngineStats()
        return EngineStats(running=len(self._running), kv_cache_usage=self._usage.share)


def _form(grammar: Grammar) -> StructuredOutputsParams:
    """A grammar in our translation, which holds what vLLM's own of JSON Schema refuses."""
    return StructuredOutputsParams(grammar=to_ebnf(grammar, None))


def _likeliest(place: dict[int, Any], count: int) -> list[tuple[int, float]]:
    """The ``count`` likeliest tokens of a place; vLLM adds the chosen one, which may be another."""
    ranked = sorted(place.items(), key=lambda item: item[1].rank)
    return [(token, _finite(found)) for token, found in ranked[:count]]


def _finite(found: Any) -> float:
    return max(_LEAST_LOGPROB, float(found.logprob))
