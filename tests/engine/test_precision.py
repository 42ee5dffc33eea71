"""How exact packed and integer linear layers are, measured on the bundled model.

It takes half a minute, so it belongs to `make test-full`; test_cpu_linear compares single layers in
the suite.
"""

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from app.core.config import ModelSettings
from app.llm.engine.transformers import cpu_linear, integer_linear
from app.llm.engine.transformers.cpu_linear import PackedLinear, pack_linears
from app.llm.engine.transformers.integer_linear import IntegerLinear, quantize_linears
from app.llm.engine.transformers.loading import load_pipeline
from app.llm.loader import find_model
from app.llm.models import bundled
from app.llm.models.description import read_gguf
from tests.support.backends import load, load_bundled, request, run, tokens

pytestmark = [
    pytest.mark.model,
    pytest.mark.full_size,
    pytest.mark.skipif(not bundled.is_fetched(), reason="the bundled model is not fetched"),
    pytest.mark.skipif(not cpu_linear.can_pack(), reason="this CPU has no bfloat16 instructions"),
]

SETTINGS = ModelSettings(source="bundled", engine="transformers", dtype="bfloat16")
ANSWER_TOKENS = 16
TOPICS = (
    "the capital of France", "how bread is baked", "why the sky is blue", "a poem about the sea",
    "Python lists", "the water cycle", "a letter to a landlord", "prime numbers", "photosynthesis",
    "how to learn chess", "the Roman empire", "black holes",
)  # fmt: skip


@dataclass
class Reference:
    """The plain model, its greedy answers and their log-probabilities.

    Attributes:
        model: In bfloat16; copy it before changing it.
    """

    model: Any
    prompts: list[list[int]]
    answers: list[list[int]]
    log_probs: list[Tensor]


def logits_of(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Logits of all tokens at each position of an answer, float32 [tokens, vocabulary]."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([prompt + answer]), use_cache=False).logits
    return logits[0, len(prompt) - 1 : -1].float()


def log_probs(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Log-probabilities of all tokens at each position of an answer, [tokens, vocabulary]."""
    return torch.log_softmax(logits_of(model, prompt, answer), dim=-1)


def greedy(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The plain model's answers to prompts of equal length."""
    rows = torch.tensor(prompts)
    output = model.generate(
        rows, attention_mask=torch.ones_like(rows), do_sample=False, max_new_tokens=ANSWER_TOKENS
    )
    end = model.generation_config.eos_token_id
    answers = output[:, rows.shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in answers]


@pytest.fixture(scope="module")
def reference() -> Reference:
    """The plain bfloat16 model's answers to the chats."""
    snapshot = find_model(SETTINGS, token=None, progress=lambda *_: None)
    pipe = load_pipeline(SETTINGS, snapshot, read_gguf(SETTINGS, snapshot))
    encoded = []
    for topic in TOPICS:
        chat = [{"role": "user", "content": f"Tell me about {topic}."}]
        rendered = pipe.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False
        )
        encoded.append(pipe.tokenizer(rendered, add_special_tokens=False)["input_ids"])
    prompts: list[list[int]] = []
    answers: list[list[int]] = []
    for _, alike in itertools.groupby(sorted(encoded, key=len), key=len):
        group = list(alike)
        prompts += group
        answers += greedy(pipe.model, group)
    scores = [log_probs(pipe.model, p, a) for p, a in zip(prompts, answers, strict=True)]
    return Reference(pipe.model, prompts, answers, scores)


def deviation(reference: Reference, bits: int) -> tuple[float, float]:
    """How much packed layers, or integers of so many bits, differ from the plain model.

    Returns:
        Share of positions with the same likeliest token, and the mean divergence (KL) in nats.
    """
    model = copy.deepcopy(reference.model)
    if bits:
        quantize_linears(model, bits)
    pack_linears(model, torch.bfloat16)
    exchanged = [m for m in model.modules() if isinstance(m, PackedLinear | IntegerLinear)]
    assert len(exchanged) > 100
    same: list[Tensor] = []
    divergences: list[Tensor] = []
    for prompt, answer, expected in zip(
        reference.prompts, reference.answers, reference.log_probs, strict=True
    ):
        got = log_probs(model, prompt, answer)
        same.append(got.argmax(-1) == expected.argmax(-1))
        divergences.append((expected.exp() * (expected - got)).sum(-1))
    return float(torch.cat(same).float().mean()), float(torch.cat(divergences).mean())


@pytest.mark.parametrize(
    ("bits", "everywhere", "least", "most"),
    [
        (0, False, 0.97, 0.003),
        (8, False, 0.96, 0.004),
        (8, True, 0.93, 0.02),
        (4, True, 0.9, 0.02),
    ],
)
def test_other_layers_stay_close_to_plain_bfloat16(
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    everywhere: bool,
    least: float,
    most: float,
) -> None:
    """The likeliest tokens agree, and the divergence is small, also with integers in every layer.

    Larger models have them in every layer, and rounding affects a small model most. Its own weights
    have 4 bits, with the same groups.
    """
    if everywhere:
        monkeypatch.setattr(integer_linear, "WORTH_QUANTIZING", 0)
    agreement, divergence = deviation(reference, bits)
    assert agreement >= least
    assert divergence <= most


def test_the_backend_chooses_the_plain_models_tokens(reference: Reference) -> None:
    """In one batch, no greedy token is more than 0.25 nats below the plain model's likeliest."""
    requests = [request(str(i), p, ANSWER_TOKENS) for i, p in enumerate(reference.prompts)]
    backend = load_bundled("transformers")
    if backend.info.dtype != SETTINGS.dtype:
        # This CPU has the kernels, but not the instructions that make them fast.
        backend = load(SETTINGS)
    events = run(backend, *requests)
    worst = 0.0
    for asked in requests:
        answer = tokens(events[asked.id])
        # Differences of logits are those of log-probabilities, without the rounding of a softmax.
        scores = logits_of(reference.model, asked.prompt_token_ids, answer)
        taken = scores.gather(-1, torch.tensor(answer).unsqueeze(-1)).squeeze(-1)
        worst = max(worst, float((scores.max(-1).values - taken).max()))
    assert worst <= 0.25
