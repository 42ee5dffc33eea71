"""Token selection against the definitions of the parameters."""

from collections import Counter

import pytest
import torch

from app.llm.engine.transformers.sampling import RequestSampler, adjust, choose
from app.llm.protocol import GenerationRequest, SamplingParams

VOCABULARY = 2000
DRAWS = 4000


def sampler_of(params: SamplingParams, *prompt: int) -> RequestSampler:
    """The sampler of a request."""
    return RequestSampler(GenerationRequest("1", [*prompt], 1, params))


def draw(logits: torch.Tensor, params: SamplingParams, draws: int = DRAWS) -> Counter[int]:
    """How often each token is chosen from the same logits with one generator."""
    sampler = sampler_of(params)
    counts: Counter[int] = Counter()
    for start in range(0, draws, 500):
        rows = min(500, draws - start)
        counts.update(choose(logits.repeat(rows, 1), [sampler] * rows).tolist())
    return counts


@pytest.fixture
def logits() -> torch.Tensor:
    """Logits with a few likely tokens and a long tail."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(VOCABULARY, generator=generator)
    values[:5] += torch.tensor([6.0, 5.5, 5.0, 4.0, 3.0])
    return values


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_frequencies_follow_the_softmax(logits: torch.Tensor, temperature: float) -> None:
    """The frequencies of likely tokens are their probabilities, within 6 standard errors."""
    counts = draw(logits, SamplingParams(temperature=temperature, seed=1))
    expected = torch.softmax(logits / temperature, -1)
    for token in range(5):
        p = expected[token].item()
        error = (p * (1 - p) / DRAWS) ** 0.5
        assert abs(counts[token] / DRAWS - p) < 6 * error + 1e-9


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1, top_k=3, seed=1),
        SamplingParams(temperature=1, top_p=0.6, seed=1),
        SamplingParams(temperature=1, min_p=0.5, seed=1),
        SamplingParams(temperature=1.3, top_k=50, top_p=0.5, min_p=0.1, seed=1),
    ],
)
def test_filters_keep_the_tokens_of_their_definition(
    logits: torch.Tensor, params: SamplingParams
) -> None:
    """Only tokens that a plain reference keeps are chosen, and all likely ones of them are."""
    probabilities = torch.softmax(logits / params.temperature, -1)
    order = probabilities.argsort(descending=True)
    kept = order[: params.top_k] if params.top_k else order
    shares = probabilities[kept] / probabilities[kept].sum()
    before = shares.cumsum(-1) - shares
    kept = kept[(before < params.top_p) & (shares >= params.min_p * shares[0])]
    counts = draw(logits, params)
    assert set(counts) <= set(kept.tolist())
    certain = [t for t in kept.tolist() if probabilities[t] / probabilities[kept].sum() > 0.01]
    assert set(certain) <= set(counts)


def test_a_flat_distribution_reaches_past_the_shortlist() -> None:
    """Top-p considers more tokens than the shortlist has."""
    flat = torch.zeros(VOCABULARY)
    counts = draw(flat, SamplingParams(temperature=1, top_p=0.999, seed=3), draws=6000)
    assert len(counts) > 1500


def test_greedy_rows_do_not_change(logits: torch.Tensor) -> None:
    """A greedy row's scores are unchanged beside a sampled row."""
    scores = logits.repeat(2, 1)
    greedy = sampler_of(SamplingParams(temperature=0))
    sampled = sampler_of(SamplingParams(temperature=1, seed=0))
    chosen = choose(scores, [greedy, sampled])
    assert torch.equal(scores[0], logits)
    assert chosen[0] == logits.argmax()


def test_rows_draw_from_their_own_generators(logits: torch.Tensor) -> None:
    """A row's choices are the same alone and beside other rows."""

    def first_ten(others: int) -> list[int]:
        mine = sampler_of(SamplingParams(temperature=1.5, seed=5))
        rows = [mine] + [
            sampler_of(SamplingParams(temperature=1, seed=i, top_p=0.9)) for i in range(others)
        ]
        return [int(choose(logits.repeat(len(rows), 1), rows)[0]) for _ in range(10)]

    assert first_ten(0) == first_ten(7)


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    """For tokens of both, positive logits are divided and negative ones multiplied."""
    sampler = sampler_of(SamplingParams(temperature=0, repetition_penalty=2.0), 0, 1)
    sampler.generated.update([2])
    adjust(scores := torch.tensor([4.0, -1.0, 3.0, 1.0]), sampler)
    assert scores.tolist() == [2.0, -2.0, 1.5, 1.0]


def test_presence_and_frequency_penalties_count_the_answer_only() -> None:
    """The logit of a token generated n times is lowered by presence + n * frequency."""
    params = SamplingParams(temperature=0, presence_penalty=1.0, frequency_penalty=0.5)
    sampler = sampler_of(params, 0)
    sampler.generated.update([1, 2, 2])
    adjust(scores := torch.tensor([4.0, 4.0, 4.0]), sampler)
    assert scores.tolist() == [4.0, 2.5, 2.0]


def test_an_extreme_distribution_is_never_out_of_range() -> None:
    """If one token has nearly all the probability, rounding never selects another one."""
    logits = torch.full((VOCABULARY,), -1e4)
    logits[17] = 1e4
    for params in (
        SamplingParams(temperature=1, seed=0),
        SamplingParams(temperature=2, top_p=0.5, seed=0),
        SamplingParams(temperature=0.01, top_k=5, min_p=0.9, seed=0),
    ):
        assert set(draw(logits, params, draws=500)) == {17}


def test_a_bias_is_added_to_its_tokens_only(logits: torch.Tensor) -> None:
    """A large bias decides, a small one shifts the odds, and other rows do not change."""
    forced = SamplingParams(temperature=1, logit_bias={1234: 100.0}, seed=1)
    assert draw(logits, forced, 500) == {1234: 500}
    banned = SamplingParams(temperature=1, logit_bias={0: -100.0, 1: -100.0}, seed=1)
    assert not {0, 1} & set(draw(logits, banned))
    scores = logits.repeat(2, 1)
    plain = sampler_of(SamplingParams(temperature=0))
    biased = sampler_of(SamplingParams(temperature=0, logit_bias={7: 50.0}))
    assert choose(scores, [plain, biased]).tolist() == [0, 7]
    shifted = SamplingParams(temperature=1, logit_bias={1: 1.0}, seed=1)
    counts = draw(logits, shifted)
    p = torch.softmax(logits + torch.nn.functional.one_hot(torch.tensor(1), VOCABULARY), -1)[
        1
    ].item()
    assert abs(counts[1] / DRAWS - p) < 6 * (p * (1 - p) / DRAWS) ** 0.5
