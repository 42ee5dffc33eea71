"""Token selection for a batch in which each request has its own parameters.

In each step a request's random generator draws one uniform number, which selects a token by inverse
transform sampling. So a request's tokens depend on its seed and its logits alone, not on the batch.
Greedy requests draw nothing.
"""

import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.llm.engine.transformers.token_masks import GrammarCompiler, TokenMask
from app.llm.protocol import FinishReason, GenerationRequest, SamplingParams, TokenEvent

# Filters try this many of the likeliest tokens first. Sorting a whole vocabulary of 50,000 takes
# milliseconds a row, and filters nearly always keep fewer than a hundred tokens.
_SHORTLIST = 1024


@dataclass
class RequestSampler:
    """One request's sampling state.

    Attributes:
        eos: Tokens that end an answer.
        generated: How often each token has been generated.
        sent: How many tokens events have had.
        top_logprobs: For each generated token the likeliest tokens and their log-probabilities.
    """

    request: GenerationRequest
    eos: list[int] = field(default_factory=list)
    mask: TokenMask | None = None
    generated: Counter[int] = field(default_factory=Counter)
    sent: int = 0
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.params = self.request.sampling
        # Without a seed the generator's state comes from the operating system.
        self.random = random.Random(self.params.seed)  # noqa: S311 - sampling, not secrecy  # nosec B311

    @classmethod
    def of(
        cls, request: GenerationRequest, grammars: GrammarCompiler, eos: Collection[int]
    ) -> "RequestSampler":
        """The sampler of a request; raises ``GrammarError`` if its grammar is bad."""
        mask = None if request.grammar is None else grammars.compile(request.grammar)
        return cls(request, sorted(eos), mask)

    def event(
        self,
        request_id: str,
        token_ids: list[int],
        finish: FinishReason | None,
        *,
        error: str | None = None,
        cached_tokens: int = 0,
    ) -> TokenEvent:
        """Accept generated tokens and report them; a grammar that fails ends the request."""
        first, self.sent = self.sent, self.sent + len(token_ids)
        self.generated.update(token_ids)
        if self.mask is not None:
            self.mask.accept(token_ids)
            if self.mask.error:
                finish, error = "error", self.mask.error
        return TokenEvent(
            request_id=request_id,
            token_ids=token_ids,
            logprobs=self.logprobs[first : self.sent],
            top_logprobs=self.top_logprobs[first : self.sent],
            finish_reason=finish,
            error=error,
            cached_tokens=0 if first else cached_tokens,
        )

    def record(self, logprobs: Tensor, chosen: int) -> None:
        """Record the chosen token's log-probability and the likeliest of all, [vocabulary]."""
        self.logprobs.append(float(logprobs[chosen]))
        if count := min(self.request.top_logprobs, logprobs.shape[-1]):
            values, tokens = logprobs.topk(count)
            self.top_logprobs.append(list(zip(tokens.tolist(), values.tolist(), strict=True)))


def choose(scores: Tensor, samplers: Sequence[RequestSampler]) -> Tensor:
    """Choose the next token of each row, int64 [rows], and record its log-probability if wanted.

    Args:
        scores: Logits, float32 [rows, vocabulary]; changed in place.
        samplers: One for each row.
    """
    recorded = [row for row, sampler in enumerate(samplers) if sampler.request.logprobs]
    # What follows changes the scores.
    logprobs = [scores[row].log_softmax(-1) for row in recorded]
    for row, sampler in zip(scores, samplers, strict=True):
        adjust(row, sampler)
    chosen = scores.argmax(-1)
    sampled = [i for i, s in enumerate(samplers) if not s.params.is_greedy]
    for pick in (_pick, _pick_filtered):
        rows = [i for i in sampled if _has_filters(samplers[i].params) == (pick is _pick_filtered)]
        if rows:
            theirs = [samplers[i] for i in rows]
            index = torch.tensor(rows, device=scores.device)
            logits = scores[index] / _column(scores, [s.params.temperature for s in theirs])
            chosen[index] = pick(logits, theirs)
    for row, values in zip(recorded, logprobs, strict=True):
        samplers[row].record(values, int(chosen[row]))
    return chosen


def adjust(row: Tensor, sampler: RequestSampler) -> None:
    """Apply the bias, the penalties and the masks of a request to its logits, [vocabulary]."""
    params = sampler.params
    if bias := params.logit_bias:
        tokens = torch.tensor(list(bias), device=row.device)
        row[tokens] += torch.tensor(list(bias.values()), device=row.device, dtype=row.dtype)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(
            sorted({*sampler.request.prompt_token_ids, *sampler.generated}), device=row.device
        )
        logits = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)
    if sampler.generated and (params.presence_penalty or params.frequency_penalty):
        tokens = torch.tensor(list(sampler.generated), device=row.device)
        counts = torch.tensor(list(sampler.generated.values()), device=row.device, dtype=row.dtype)
        row[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    if sampler.sent < params.min_tokens:
        row[sampler.eos] = -torch.inf
    if sampler.mask is not None:
        sampler.mask.apply(row)


def _has_filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _pick(logits: Tensor, samplers: Sequence[RequestSampler]) -> Tensor:
    return _invert(torch.softmax(logits, dim=-1), samplers)


def _pick_filtered(logits: Tensor, samplers: Sequence[RequestSampler]) -> Tensor:
    vocabulary = logits.shape[-1]
    largest_k = max(s.params.top_k for s in samplers)
    width = min(vocabulary, max(_SHORTLIST, largest_k))
    values, tokens = _shortlist(logits, width)
    probabilities, complete = _filter(values, logits.logsumexp(-1, keepdim=True), samplers)
    if width < vocabulary and not complete:
        values, tokens = torch.sort(logits, dim=-1, descending=True, stable=True)
        probabilities, _ = _filter(values, logits.logsumexp(-1, keepdim=True), samplers)
    return tokens.gather(-1, _invert(probabilities, samplers).unsqueeze(-1)).squeeze(-1)


def _shortlist(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The largest logits in descending order, equal ones by token id, and their tokens.

    16-bit logits are often equal: argmax takes the first of them, topk any.
    """
    values, tokens = torch.topk(logits, width, dim=-1)
    tokens, by_id = tokens.sort(dim=-1)
    values, order = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(-1, order)


def _filter(
    values: Tensor, log_total: Tensor, samplers: Sequence[RequestSampler]
) -> tuple[Tensor, bool]:
    """Set the probabilities of excluded tokens to 0.

    Args:
        values: The largest logits in descending order, [rows, width].
        log_total: Logarithm of the sum of all tokens' exponentials, [rows, 1].
        samplers: One for each row.

    Returns:
        Probabilities, [rows, width], and whether no token beyond ``width`` could be kept.
    """
    width = values.shape[-1]
    rank = torch.arange(width, device=values.device)
    top_k = _column(values, [s.params.top_k or float("inf") for s in samplers])
    probabilities = (values - log_total).exp().masked_fill(rank >= top_k, 0.0)
    limited = torch.isfinite(top_k)
    # After top-k, top-p counts shares of the tokens that are left (Holtzman et al., 2020).
    total = torch.where(limited, probabilities.sum(-1, keepdim=True), 1.0)
    probabilities = probabilities / total
    before = probabilities.cumsum(-1) - probabilities
    keep = before < _column(values, [s.params.top_p for s in samplers])
    floor = probabilities[:, :1] * _column(values, [s.params.min_p for s in samplers])
    keep &= probabilities >= floor
    keep[:, 0] = True
    complete = bool((limited | ~keep[:, -1:]).all())
    return probabilities.masked_fill(~keep, 0.0), complete


def _invert(probabilities: Tensor, samplers: Sequence[RequestSampler]) -> Tensor:
    """Index at which each row's cumulative sum first exceeds its draw, int64 [rows]."""
    cumulative = probabilities.cumsum(-1)
    draws = _column(probabilities, [s.random.random() for s in samplers]) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, draws, right=True).squeeze(-1)
    # Rounding may move a draw to the end of the sum: take the last token with a probability.
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)
    return torch.minimum(index, last)


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(-1)
