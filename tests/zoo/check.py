"""Compares a backend's greedy tokens with ``model.generate`` of the same folder."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

from app.llm.protocol import Backend
from tests.support import backends, tiny_model
from tests.zoo.tiny import CONTEXT_LENGTH

LENGTHS: Final = (3, 17, 64, 65, 130, 255, 400, 503)
"""Prompt tokens: below, at and past a window, past a step's chunk, and up to the context."""

ANSWER: Final = 16
"""Most tokens of an answer; that of the longest prompt ends where the context does."""

# Logits that differ by less than this share of the largest are equal in single precision.
_TIE: Final = 1e-4


def prompts(seed: int, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Random prompts without special tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(3, tiny_model.VOCABULARY) for _ in range(n)] for n in lengths]


class Reference:
    """transformers' own greedy answers, computed prompt by prompt."""

    def __init__(self, folder: Path, **source: Any) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
        self._known: dict[tuple[int, ...], list[int]] = {}

    def answer(self, prompt: Sequence[int]) -> list[int]:
        """At most :data:`ANSWER` tokens, as ``generate`` chooses them."""
        if (known := self._known.get(tuple(prompt))) is not None:
            return known
        ids = torch.tensor([prompt])
        most = min(ANSWER, CONTEXT_LENGTH - len(prompt))
        said = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most
        )
        answer = self._known[tuple(prompt)] = [int(token) for token in said[0, len(prompt) :]]
        return answer

    def agrees(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether an answer is the model's, or parts from it where two tokens are equally good."""
        expected = self.answer(prompt)
        if list(answer) == expected:
            return True
        pairs = enumerate(zip(answer, expected, strict=False))
        same = next((i for i, (got, wanted) in pairs if got != wanted), None)
        if same is None:
            return False
        ids = torch.tensor([[*prompt, *expected[:same]]])
        with torch.inference_mode():
            logits = self._model(ids).logits[0, -1]
        gap = logits[expected[same]] - logits[answer[same]]
        return bool(abs(gap) < _TIE * logits.abs().max())


def faults(backend: Backend, reference: Reference, lengths: Sequence[int] = LENGTHS) -> list[str]:
    """Ask alone, as a batch, and again; what was asked where an answer is not the reference's."""
    found = []
    alone, together = prompts(1, lengths), prompts(2, lengths)
    # The last round finds its prompts in the prefix cache.
    for name, rounds in (
        ("alone", [[prompt] for prompt in alone]),
        ("in a batch", [together]),
        ("again", [[together[-1]], [alone[0]]]),
    ):
        wrong = [n for asked in rounds for n in _ask(backend, reference, asked)]
        if wrong:
            found.append(f"{name}: prompts of {', '.join(map(str, wrong))} tokens")
    return found


def _ask(backend: Backend, reference: Reference, asked: list[list[int]]) -> list[int]:
    """Ask prompts together; the lengths of those with another answer, or not streamed."""
    requests = [
        backends.request(str(i), prompt, min(ANSWER, CONTEXT_LENGTH - len(prompt)))
        for i, prompt in enumerate(asked)
    ]
    events = backends.run(backend, *requests)
    wrong = []
    for i, prompt in enumerate(asked):
        answer = backends.tokens(events[str(i)])
        streamed = len(events[str(i)]) >= len(answer)
        if not (streamed and reference.agrees(prompt, answer)):
            wrong.append(len(prompt))
    return wrong
