"""How much a batch changes log-probabilities of a model in less than float32.

The suite takes batches of 8, `make test-full` of 32.
"""

import os

import pytest

from app.llm.models import bundled
from app.llm.tokenizer import PromptTokenizer
from tests.support.backends import load_bundled, logprobs, request, run, tokens

pytestmark = [
    pytest.mark.model,
    pytest.mark.no_cover,
    pytest.mark.skipif(not bundled.is_fetched(), reason="the bundled model is not fetched"),
]

TOGETHER, ALONE = (32, 4) if "FULL_SIZE" in os.environ else (8, 1)
BOUND = 0.35
"""Largest change of a token's log-probability, in nats.

Measured with AVX-512: 0.18 with OpenVINO on the Q4_1 file, 0.12 with transformers in bfloat16.
"""


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("auto", id="openvino"),
        pytest.param("transformers", marks=pytest.mark.full_size),
    ],
)
def test_a_batch_changes_log_probabilities_little(engine: str) -> None:
    """A chat's greedy tokens have nearly the same log-probabilities alone and in a batch.

    The rounding of 16-bit sums depends on their order, and the order on the batch. The comparison
    ends at the first different token.
    """
    backend = load_bundled(engine)
    tokenizer = PromptTokenizer(backend.info)
    prompts = {
        f"r{i}": tokenizer.encode_rendered(
            tokenizer.render_chat([{"role": "user", "content": f"Tell me about the number {i}."}])
        )
        for i in range(TOGETHER)
    }
    asked = {
        name: request(name, prompt, max_tokens=10, logprobs=True)
        for name, prompt in prompts.items()
    }
    alone = {name: run(backend, asked[name])[name] for name in list(asked)[:ALONE]}
    together = run(backend, *asked.values())
    worst, same = 0.0, 0
    for name, events in alone.items():
        beside = together[name]
        pairs = zip(
            tokens(events), tokens(beside), logprobs(events), logprobs(beside), strict=False
        )
        for mine, other, before, after in pairs:
            worst = max(worst, abs(before - after))
            if mine != other:
                break
            same += 1
    tokenizer.close()
    total = sum(len(tokens(events)) for events in alone.values())
    measured = f"{same} of {total} tokens the same, {worst:.3f} nats at most"
    assert worst <= BOUND, measured
    assert same >= total / 2, measured
