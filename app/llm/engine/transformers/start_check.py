"""The check at the start: a backend's greedy tokens are those of the library's ``generate``.

A model that has passed is not checked again with the same files, versions and precision. The record
is an empty file beside the hub's cache.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from huggingface_hub import constants
from torch import Tensor
from transformers import GenerationConfig

from app.llm.engine.transformers.attention_choice import attention_of
from app.llm.models.description import context_length, fixed_rope_limit
from app.llm.models.files import fingerprint
from app.llm.models.snapshot import Snapshot
from app.llm.protocol import Backend, EngineInfo, GenerationRequest, SamplingParams, TokenEvent

# Two prompts of one length, and one that is longer than a page of the cache.
_LENGTHS: Final = (9, 9, 40)
# Their answers end one after the other. The third token is the first that needs what a step of one
# token wrote into the cache.
_ANSWERS: Final = (3, 1, 2)
# Largest difference of log-probabilities in float32, and in 16 bits, where kernels round apart.
_TOLERANCE: Final = 2e-3
_TOLERANCE_16: Final = 0.3
# The mean of all differences is smaller than the largest one that is looked at.
_CAUSAL: Final = 20


@dataclass(frozen=True)
class _Answer:
    """A prompt, the greedy tokens after it, and the log-probabilities [tokens, vocabulary]."""

    prompt: list[int]
    tokens: list[int]
    logprobs: Tensor


class StartCheck:
    """Compares backends with the library's own generation.

    Args:
        model: With the attention function that it was loaded with.
        known_as: Names the model in the record; ``None``: it is checked, and there is no record.
        tolerance: Largest difference of log-probabilities, in nats; by default that of rounding.
        window: A longer prompt goes past a sliding window of so many tokens; 0: there is none.
    """

    def __init__(
        self,
        model: Any,
        known_as: str | None = None,
        *,
        tolerance: float | None = None,
        window: int = 0,
    ) -> None:
        self._model = model
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        # Beyond its limit a rotary embedding changes for the tokens before, too.
        limit = min(context_length(model.config), fixed_rope_limit(model.config))
        self._longest = int(limit) - max(_ANSWERS)
        self._rounding = _TOLERANCE if model.dtype == torch.float32 else _TOLERANCE_16
        self._tolerance = self._rounding if tolerance is None else tolerance
        self._known_as = known_as
        self._lengths = (*_LENGTHS, window + _LENGTHS[-1]) if window else _LENGTHS
        self._answers: list[_Answer] = []

    def prepare(self, path: str) -> None:
        """Generate the answers that a backend is compared with, before it changes the model.

        Raises:
            ValueError: The model is not causal: its tokens see later ones.
        """
        if self._answers or self._has_passed(path):
            return
        with torch.inference_mode():
            prompts = [self._prompt(i, length) for i, length in enumerate(self._lengths)]
            self._check_causal(prompts[0])
            # Prompts of one length share the steps of one batch.
            self._answers = self._generate(prompts[:2], _ANSWERS[:2])
            for prompt in prompts[2:]:
                self._answers += self._generate([prompt], _ANSWERS[2:])

    def passes(self, path: str, backend: Backend) -> bool:
        """Whether a backend's answers are those of ``generate``, alone and together."""
        if not self._answers:
            return True
        numbers = range(len(self._answers))
        for together in (*([i] for i in numbers), numbers):
            given = self._run(backend, together)
            if not all(self._agree(self._answers[i], given[i]) for i in together):
                return False
        record = self._record(path)
        with contextlib.suppress(OSError):
            if record is None:
                return True
            record.parent.mkdir(parents=True, exist_ok=True)
            record.touch()
        return True

    def _has_passed(self, path: str) -> bool:
        record = self._record(path)
        with contextlib.suppress(OSError):
            return record is not None and record.exists()
        return False

    def _record(self, path: str) -> Path | None:
        if self._known_as is None:
            return None
        return Path(constants.HF_HOME) / "checked-models" / f"{self._known_as}-{path}"

    def _prompt(self, number: int, length: int) -> list[int]:
        # The first and last tokens of a vocabulary are often special ones, for images for example.
        first = self._vocabulary // 4
        length = max(1, min(length, self._longest))
        return [first + (7919 * i + 104729 * number) % max(1, first) for i in range(length)]

    def _check_causal(self, prompt: list[int]) -> None:
        # A causal model computes both rows alike up to their last token, except where a mixture of
        # experts groups the tokens otherwise.
        rows = [[*prompt[:-1], last] for last in (prompt[-1], prompt[0])]
        logits = self._model(**self._inputs(rows), return_dict=True).logits[:, :-1]
        first, second = logits.float().log_softmax(-1)
        change = (first - second).abs().mean()
        if len(prompt) > 1 and not change <= self._rounding / _CAUSAL:
            raise ValueError("its tokens see later ones, which text generation does not support")

    def _inputs(self, rows: list[list[int]]) -> dict[str, Tensor]:
        ids = torch.tensor(rows, device=self._model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _generate(self, prompts: list[list[int]], counts: Sequence[int]) -> list[_Answer]:
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=max(counts),
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        # Otherwise the model's own settings, penalties for example, would be added.
        own, self._model.generation_config = self._model.generation_config, GenerationConfig()
        try:
            output = self._model.generate(**self._inputs(prompts), generation_config=greedy)
        finally:
            self._model.generation_config = own
        tokens = output.sequences[:, len(prompts[0]) :]
        logprobs = torch.stack(output.logits, dim=1).float().log_softmax(-1)
        return [
            _Answer(prompt, tokens[i, :count].tolist(), logprobs[i, :count])
            for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
        ]

    def _run(self, backend: Backend, numbers: Sequence[int]) -> dict[int, list[TokenEvent]]:
        given: dict[str, list[TokenEvent]] = {f"check-{i}": [] for i in numbers}
        for i in numbers:
            backend.add(
                GenerationRequest(
                    id=f"check-{i}",
                    prompt_token_ids=self._answers[i].prompt,
                    max_tokens=len(self._answers[i].logprobs),
                    sampling=SamplingParams(temperature=0),
                    logprobs=True,
                )
            )
        while backend.has_work():
            for event in backend.step():
                given[event.request_id].append(event)
        return {i: given[f"check-{i}"] for i in numbers}

    def _agree(self, expected: _Answer, given: list[TokenEvent]) -> bool:
        """Whether an answer is the expected one, as far as rounding lets one say."""
        tokens = [token for event in given for token in event.token_ids]
        values = [value for event in given for value in event.logprobs]
        if not tokens or given[-1].finish_reason == "error":
            return False
        for row, best, token, value in zip(
            expected.logprobs, expected.tokens, tokens, values, strict=False
        ):
            if token != best:
                # Two tokens are about as likely: the answers part, and the rest says nothing.
                return self._near(row, token, row.max())
            if not self._near(row, token, value):
                return False
        return True

    def _near(self, row: Tensor, token: int, value: float | Tensor) -> bool:
        # False for values that are no numbers.
        return bool(abs(row[token] - value) <= self._tolerance)


def known_as(model: Any, info: EngineInfo, snapshot: Snapshot) -> str:
    """Names the model's files, the code that runs it, and how it computes."""
    versions = (
        torch.__version__,
        transformers.__version__,
        torch.backends.cpu.get_cpu_capability(),
    )
    code = Path(__file__).parent.glob("*.py")
    return fingerprint(snapshot, code, versions, info.device, info.dtype, attention_of(model))
