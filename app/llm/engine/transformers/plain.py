"""The plain backend: a cache of the library's own for each request, without pages.

It runs what the paged backend cannot: hybrid and recurrent models, others whose attention takes no
paged cache, and a rotary embedding that depends on the length of the whole batch. The model itself
makes its cache, of whatever class, and prepares the inputs of each step, as in ``generate``.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from operator import eq
from typing import Final

import torch
from torch import Tensor
from transformers import Pipeline

from app.llm.engine.cache_size import PROMPT_TOKENS_PER_STEP, cache_bytes
from app.llm.engine.transformers.attention_choice import runs_on_gpu
from app.llm.engine.transformers.caching_model import Cache, CachingModel
from app.llm.engine.transformers.sampling import RequestSampler, choose
from app.llm.engine.transformers.token_masks import GrammarCompiler
from app.llm.models.description import eos_token_ids
from app.llm.protocol import EngineInfo, EngineStats, FinishReason, GenerationRequest, TokenEvent

_MOST_ROWS: Final = 8
_SHORT_PIECE: Final = 16
# A shorter beginning is read again sooner than it is looked for.
_LEAST_REUSED: Final = 32


@dataclass
class _Group:
    """Requests of equal length that share a cache, with a row for each.

    Attributes:
        ids: Prompts and answers, int64 [rows, tokens].
        in_pieces: Whether tokens may be added to the cache more than one at a time.
        cached: Tokens in the cache.
        reused: Tokens that were in the cache before the request.
    """

    rows: list[RequestSampler]
    ids: Tensor
    in_pieces: bool = False
    cache: Cache = field(default_factory=dict)
    cached: int = 0
    reused: int = 0


class PlainBackend:
    """Any Hugging Face causal language model, on a CPU or a CUDA device.

    Args:
        pipe: A text-generation pipeline.
        max_running: Most requests at once.
        cuda_memory_share: Share of a GPU's free memory for the caches.
    """

    def __init__(
        self, pipe: Pipeline, info: EngineInfo, *, max_running: int, cuda_memory_share: float
    ) -> None:
        self.info = info
        self._prompt_tokens_per_step = PROMPT_TOKENS_PER_STEP
        model = self._model = pipe.model
        self._eos = eos_token_ids(model.generation_config, pipe.tokenizer)
        self._grammars = GrammarCompiler(info.tokenizer_json, info.vocabulary_size, self._eos)
        self._waiting: deque[RequestSampler] = deque()
        self._groups: list[_Group] = []
        self._kept: list[tuple[list[int], _Group]] = []
        self._most_kept = max_running
        self._caching = CachingModel(model)
        self._budget = cache_bytes(
            self._caching.size,
            context_length=info.context_length,
            max_running=max_running,
            memory=torch.cuda.mem_get_info()[0] * cuda_memory_share if runs_on_gpu(model) else None,
        )

    @contextmanager
    def reading_short_pieces(self) -> Iterator[None]:
        """Read even short prompts in pieces, so that a check of them covers it."""
        self._prompt_tokens_per_step = _SHORT_PIECE
        yield
        self._prompt_tokens_per_step = PROMPT_TOKENS_PER_STEP

    def add(self, request: GenerationRequest) -> None:
        """Take a request into the next step; raises ``GrammarError`` if its grammar is bad."""
        self._waiting.append(RequestSampler.of(request, self._grammars, self._eos))

    def cancel(self, request_id: str) -> None:
        """Free a request's cache before the next step."""
        self._waiting = deque(row for row in self._waiting if row.request.id != request_id)
        for group in list(self._groups):
            left = [i for i, row in enumerate(group.rows) if row.request.id != request_id]
            if len(left) < len(group.rows):
                self._leave(group, left)

    def step(self) -> list[TokenEvent]:
        """One token for each request whose prompt has been read, and a piece of the prompts."""
        events: list[TokenEvent] = []
        self._start()
        budget = self._prompt_tokens_per_step
        for group in list(self._groups):
            count = group.ids.shape[1] - group.cached
            is_last = True
            if group.rows[0].sent == 0:
                if budget <= 0:
                    continue
                if group.in_pieces and count > (most := max(1, budget // len(group.rows))):
                    count, is_last = most, False
                budget -= count * len(group.rows)
            with torch.inference_mode():
                read = group.ids[:, : group.cached + count]
                logits, group.cache = self._caching.forward(read, count, group.cache)
                # A model without a cache reads everything in each step.
                group.cached = read.shape[1] if group.cache else 0
                if is_last:
                    events += self._next_tokens(group, logits)
        return events

    def _start(self) -> None:
        """Start waiting requests in their order, as far as their whole answers fit the memory."""
        while self._waiting:
            row = self._waiting[0]
            needed = self._caching.size(_length(row))
            while self._kept and self._used() + needed > self._budget:
                self._kept.pop(0)
            if self._groups and self._used() + needed > self._budget:
                return
            self._waiting.popleft()
            in_pieces = _length(row) <= self._caching.piece_limit
            prompt = torch.tensor([row.request.prompt_token_ids], device=self._model.device)
            group = _Group([row], prompt, in_pieces)
            if in_pieces:
                self._reuse(group)
            last = self._groups[-1] if self._groups else group
            if last is not group and self._can_join(last, group):
                last.rows.append(row)
                last.ids = torch.cat([last.ids, prompt])
            else:
                self._groups.append(group)

    def _reuse(self, group: _Group) -> None:
        """Take over the kept cache that has most of the prompt, if one has enough of it."""
        prompt = group.rows[0].request.prompt_token_ids
        best, place = 0, -1
        for i, (tokens, _) in enumerate(self._kept):
            # The last token is always read, because it brings the first logits.
            shared = min(sum(takewhile(bool, map(eq, tokens, prompt))), len(prompt) - 1)
            if shared > best and (shared == len(tokens) or self._caching.can_crop):
                best, place = shared, i
        if best >= _LEAST_REUSED:
            tokens, kept = self._kept.pop(place)
            if best < len(tokens):
                for cache in kept.cache.values():
                    cache.crop(best - len(tokens))
            group.cache, group.cached, group.reused = kept.cache, best, best

    def _can_join(self, group: _Group, other: _Group) -> bool:
        rows, length = len(group.rows) + 1, other.ids.shape[1]
        return (
            self._caching.has_rows
            and not group.cached
            and not other.cached
            and group.ids.shape[1] == length
            and group.in_pieces == other.in_pieces
            and rows <= _MOST_ROWS
            and (other.in_pieces or rows * length <= self._prompt_tokens_per_step)
        )

    def _next_tokens(self, group: _Group, logits: Tensor) -> list[TokenEvent]:
        chosen = choose(logits, group.rows)
        group.ids = torch.cat([group.ids, chosen.unsqueeze(-1)], dim=-1)
        events = []
        for row, token in zip(group.rows, chosen.tolist(), strict=True):
            is_full = row.sent + 1 >= row.request.max_tokens
            finish: FinishReason | None = "length" if is_full else None
            if token in self._eos:
                finish = "stop"
            name, reused = row.request.id, group.reused
            events.append(row.event(name, [token], finish, cached_tokens=reused))
        self._leave(group, [i for i, event in enumerate(events) if event.finish_reason is None])
        return events

    def _leave(self, group: _Group, left: list[int]) -> None:
        """Keep only these rows of a group; the cache of its last request is kept for a session."""
        if not left:
            self._groups.remove(group)
            if group.in_pieces and len(group.rows) == 1 and group.cached >= _LEAST_REUSED:
                self._kept.append((group.ids[0, : group.cached].tolist(), group))
                del self._kept[: -self._most_kept]
        elif len(left) < len(group.rows):
            index = torch.tensor(left, device=group.ids.device)
            group.rows, group.ids = [group.rows[i] for i in left], group.ids[index]
            with torch.inference_mode():
                for cache in group.cache.values():
                    cache.reorder_cache(index)

    def has_work(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self._waiting or self._groups)

    def stats(self) -> EngineStats:
        """Figures of the moment; kept caches count as free, as they are given up when needed."""
        running = sum(len(group.rows) for group in self._groups) + len(self._waiting)
        used = self._used() - sum(self._caching.size(len(tokens)) for tokens, _ in self._kept)
        return EngineStats(running=running, kv_cache_usage=min(1.0, used / self._budget))

    def _used(self) -> float:
        lengths = [_length(row) for group in self._groups for row in group.rows]
        return sum(map(self._caching.size, [*lengths, *(len(tokens) for tokens, _ in self._kept)]))


def _length(row: RequestSampler) -> int:
    """Tokens of the prompt and of the longest answer."""
    return len(row.request.prompt_token_ids) + row.request.max_tokens
