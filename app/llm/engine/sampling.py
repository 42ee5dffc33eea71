"""Token selection for a batch in which every request has parameters of its own.

One uniform number per request and step, from the request's own generator, picks a token by the
inverse of its cumulative distribution. A request's draw therefore depends on its seed and its
logits alone, never on who shares the batch, and greedy rows cost nothing.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from app.llm.engine.base import SamplingParams
from app.llm.engine.token_masks import TokenMask

# Filters look at this many of the likeliest tokens first; sorting a whole vocabulary of 50,000
# takes milliseconds a row, and the filters nearly always end within the first hundred.
_SHORTLIST = 1024


@dataclass
class RequestSampler:
    """One request's parameters, its random generator and the tokens its penalties count.

    Attributes:
        params: How to choose.
        prompt_token_ids: The prompt, for the repetition penalty.
        generated: How often each token was generated so far.
        tells_logprobs: Whether the caller asked for log-probabilities.
        tells_top_logprobs: How many of the likeliest tokens are to be told beside each token.
        mask: What the answer's grammar allows, if it has one.
        logprobs: Those of the tokens so far, in order, where they are told.
        top_logprobs: The likeliest tokens of the places so far, the same.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    generated: Counter[int] = field(default_factory=Counter)
    tells_logprobs: bool = False
    tells_top_logprobs: int = 0
    mask: TokenMask | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # An unseeded generator takes its state from the operating system.
        self._random = random.Random(self.params.seed)  # noqa: S311 - sampling, not secrecy  # nosec B311

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.params.is_greedy

    @property
    def has_penalties(self) -> bool:
        """Whether tokens seen before change the logits."""
        p = self.params
        return (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def has_filters(self) -> bool:
        """Whether unlikely tokens are cut off."""
        p = self.params
        return p.top_k > 0 or p.top_p < 1 or p.min_p > 0

    def draw(self) -> float:
        """The next uniform number in [0, 1)."""
        return self._random.random()

    def accept(self, token_ids: Sequence[int]) -> None:
        """Count tokens that were chosen."""
        self.generated.update(token_ids)
        if self.mask is not None:
            self.mask.accept(token_ids)

    def note(self, logprobs: Tensor, chosen: int) -> None:
        """Keep what is to be told of a token.

        Args:
            logprobs: Of the place, by the model alone, [vocabulary].
            chosen: The token.
        """
        self.logprobs.append(float(logprobs[chosen]))
        if self.tells_top_logprobs:
            values, tokens = logprobs.topk(min(self.tells_top_logprobs, logprobs.shape[-1]))
            self.top_logprobs.append(list(zip(tokens.tolist(), values.tolist(), strict=True)))


def choose(scores: Tensor, samplers: Sequence[RequestSampler]) -> Tensor:
    """The next token of each row, and its log-probability noted where that is asked for.

    Args:
        scores: Logits, float32 [rows, vocabulary]; changed in place.
        samplers: One for each row, in order.

    Returns:
        Token ids, int64 [rows].
    """
    asked = [row for row, sampler in enumerate(samplers) if sampler.tells_logprobs]
    # Before the selection changes the scores.
    logprobs = [scores[row].log_softmax(-1) for row in asked]
    chosen = select(scores, samplers).argmax(-1)
    for row, values in zip(asked, logprobs, strict=True):
        samplers[row].note(values, int(chosen[row]))
    return chosen


def select(scores: Tensor, samplers: Sequence[RequestSampler]) -> Tensor:
    """Mark each sampled row's chosen token, so that an argmax finds it.

    Args:
        scores: Logits, float32 [rows, vocabulary]; changed in place.
        samplers: One for each row, in order.

    Returns:
        ``scores``: greedy rows as they were but for penalties and masks, sampled rows with an
        infinity at the chosen token.
    """
    for row, sampler in enumerate(samplers):
        if bias := sampler.params.logit_bias:
            tokens = torch.tensor(list(bias), device=scores.device)
            scores[row, tokens] += torch.tensor(
                list(bias.values()), device=scores.device, dtype=scores.dtype
            )
        if sampler.has_penalties:
            _penalise(scores[row], sampler)
        if sampler.mask is not None:
            sampler.mask.apply(scores[row])
    plain = [i for i, s in enumerate(samplers) if not s.is_greedy and not s.has_filters]
    filtered = [i for i, s in enumerate(samplers) if not s.is_greedy and s.has_filters]
    for rows, pick in ((plain, _pick), (filtered, _pick_filtered)):
        if rows:
            chosen_samplers = [samplers[i] for i in rows]
            index = torch.tensor(rows, device=scores.device)
            logits = scores[index] / _column(
                scores, [s.params.temperature for s in chosen_samplers]
            )
            scores[index, pick(logits, chosen_samplers)] = torch.inf
    return scores


def _penalise(row: Tensor, sampler: RequestSampler) -> None:
    """Apply the three penalties to one row of logits, in place."""
    params = sampler.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(
            sorted({*sampler.prompt_token_ids, *sampler.generated}), device=row.device
        )
        logits = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(logits > 0, logits / penalty, logits * penalty)
    if sampler.generated and (params.presence_penalty or params.frequency_penalty):
        tokens = torch.tensor(list(sampler.generated), device=row.device)
        counts = torch.tensor(list(sampler.generated.values()), device=row.device, dtype=row.dtype)
        row[tokens] -= params.presence_penalty + params.frequency_penalty * counts


def _pick(logits: Tensor, samplers: Sequence[RequestSampler]) -> Tensor:
    """Inverse-CDF sampling over the whole vocabulary; token ids, int64 [rows]."""
    return _invert(torch.softmax(logits, dim=-1), samplers)


def _pick_filtered(logits: Tensor, samplers: Sequence[RequestSampler]) -> Tensor:
    """Sampling after top-k, top-p and min-p, in that order; token ids, int64 [rows]."""
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

    16-bit logits are often equal; topk orders those as it likes, argmax takes the first.
    """
    values, tokens = torch.topk(logits, width, dim=-1)
    tokens, by_id = tokens.sort(dim=-1)
    values, order = values.gather(-1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(-1, order)


def _filter(
    values: Tensor, log_total: Tensor, samplers: Sequence[RequestSampler]
) -> tuple[Tensor, bool]:
    """Probabilities that survive the filters, and whether the shortlist was long enough.

    Args:
        values: Logits in descending order, [rows, width].
        log_total: Log of the sum over the whole vocabulary, [rows, 1].
        samplers: One for each row.
    """
    width = values.shape[-1]
    rank = torch.arange(width, device=values.device)
    top_k = _column(values, [s.params.top_k or float("inf") for s in samplers])
    probabilities = (values - log_total).exp().masked_fill(rank >= top_k, 0.0)
    limited = torch.isfinite(top_k)
    # After a top-k cut, top-p counts shares of what is left (Holtzman et al., 2020).
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
    """First index at which the cumulative sum exceeds each row's draw; int64 [rows]."""
    cumulative = probabilities.cumsum(-1)
    draws = _column(probabilities, [s.draw() for s in samplers]) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, draws, right=True).squeeze(-1)
    # Rounding may put the draw on the very end of the sum: then the last likely token is meant.
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)
    return torch.minimum(index, last)


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    """``values`` as a float32 column on the device of ``like``, [rows, 1]."""
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(-1)
