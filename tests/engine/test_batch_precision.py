"""What sharing a batch may cost in exactness, where a model runs in less than float32."""

import pytest

from app.llm.models import bundled
from app.llm.tokenizer import PromptTokenizer
from tests.support.backends import MAX_RUNNING, load_bundled, logprobs, request, run, tokens

pytestmark = [
    pytest.mark.model,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not bundled.is_fetched(), reason="the bundled model is not fetched"),
]

BOUND = 0.35
"""Most that a token's log-probability may change, in nats.

Measured with AVX-512: 0.18 with OpenVINO on the Q4_1 file, 0.12 with transformers in bfloat16.
"""


@pytest.mark.parametrize("engine", ["auto", "transformers"], ids=["openvino", "transformers"])
def test_a_batch_changes_log_probabilities_little(engine: str) -> None:
    """A chat's greedy tokens alone and among 31 others, as far as they are the same tokens.

    Sums of 16-bit numbers depend on their order, and that on the batch. A different token is only
    taken where two are about as likely.
    """
    backend = load_bundled(engine)
    tokenizer = PromptTokenizer(backend.info)
    prompts = {
        f"r{i}": tokenizer.encode_rendered(
            tokenizer.render_chat([{"role": "user", "content": f"Tell me about the number {i}."}])
        )
        for i in range(MAX_RUNNING)
    }
    asked = {
        name: request(name, prompt, max_tokens=16, logprobs=True)
        for name, prompt in prompts.items()
    }
    alone = {name: run(backend, asked[name])[name] for name in list(asked)[:8]}
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
