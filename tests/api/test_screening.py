"""Personal data, blocked patterns and control characters, in prompts and answers."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from app.utils.errors import ConfigurationError
from tests.support.application import Client, make_app, start
from tests.support.sse import Streamed, parse

# The tests share applications, which live on one event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET = "Write to jane.doe@example.com or call +49 30 1234567, card 4111 1111 1111 1111."
REDACTED = "Write to [EMAIL] or call [PHONE], card [CARD]."


async def streamed(client: Client, text: str) -> Streamed:
    """One streamed chat without a session."""
    response: httpx.Response = await client.say(text, session=None, stream=True, cache=False)
    return parse(response.text, response.headers)


async def generate(client: Client, prompt: str, **fields: Any) -> httpx.Response:
    """One call of /v1/generate."""
    return await client.http.post("/v1/generate", json={"prompt": prompt, **fields})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain() -> AsyncIterator[Client]:
    """The default settings."""
    async with start() as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def redacting() -> AsyncIterator[Client]:
    """Answers are redacted, prompts are not."""
    async with start(pii={"output": "redact"}) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def particular() -> AsyncIterator[Client]:
    """One kind and one pattern are redacted in answers, and another pattern ends them."""
    pii = {
        "output": "redact",
        "kinds": ["email"],
        "patterns": [{"name": "badge", "pattern": r"\bB-\d{4}\b"}],
    }
    async with start(pii=pii, output={"blocked_patterns": ["(?i)forbidden"]}) as client:
        yield client


async def test_by_default_nothing_is_touched(plain: Client) -> None:
    """Without settings for PII, text passes unchanged."""
    answer = (await plain.say(SECRET, session=None)).json()
    assert answer["message"]["content"] == SECRET


async def test_an_answer_is_redacted_the_same_whole_and_streamed(redacting: Client) -> None:
    """The joined pieces of a stream equal the redacted whole answer."""
    whole = (await redacting.say(SECRET, session=None, cache=False)).json()
    stream = await streamed(redacting, SECRET)
    assert whole["message"]["content"] == stream.text == REDACTED
    assert len([p for p in stream.pieces if p]) > 3
    assert (await generate(redacting, SECRET)).json()["generated_text"] == REDACTED


async def test_redactions_are_counted_by_kind(redacting: Client) -> None:
    """The metric counts each kind."""

    def counted() -> list[float]:
        value = redacting.services.metrics.registry.get_sample_value
        return [value("pii_redactions_total", {"kind": k}) or 0 for k in ("email", "card")]

    before = counted()
    await redacting.say(SECRET, session=None, cache=False)
    assert counted() == [count + 1 for count in before]


async def test_prompts_are_redacted_before_the_model_and_the_history() -> None:
    """With pii.input redact neither the model nor a session gets the data."""
    async with start(pii={"input": "redact"}) as client:
        assert (await client.say(SECRET)).json()["message"]["content"] == REDACTED
        assert await client.history() == [("user", REDACTED), ("assistant", REDACTED)]
        answer = (await generate(client, SECRET)).json()
        assert (answer["generated_text"], answer["prompt"]) == (REDACTED, SECRET)


async def test_prompts_with_personal_data_can_be_refused() -> None:
    """With pii.input reject the error names the kinds and not the data; no session is made."""
    async with start(pii={"input": "reject"}) as client:
        for refused in (await client.say(SECRET), await generate(client, SECRET)):
            assert refused.status_code == 400
            assert refused.json()["error"]["code"] == "pii_detected"
            assert "email" in refused.text
            assert "jane" not in refused.text
        assert len(client.services.state.sessions) == 0
        assert (await client.say("Nothing personal.")).status_code == 200


async def test_kinds_can_be_switched_and_patterns_added(particular: Client) -> None:
    """Only the configured kinds and patterns are redacted."""
    answer = (await particular.say("B-1234, a@b.example, +49 30 1234567", session=None)).json()
    assert answer["message"]["content"] == "[BADGE], [EMAIL], +49 30 1234567"


async def test_a_blocked_pattern_ends_the_answer(particular: Client) -> None:
    """An answer ends before the match, with the reason content_filter."""
    text = "This is fine. FORBIDDEN words follow."
    whole = (await particular.say(text, session=None, cache=False)).json()
    stream = await streamed(particular, text)
    assert whole["message"]["content"] == stream.text == "This is fine. "
    assert whole["finish_reason"] == stream.last["finish_reason"] == "content_filter"


async def test_control_characters_and_template_tokens_do_not_leave(plain: Client) -> None:
    """Control characters and special tokens are removed from answers, streamed or not."""
    text = "a\x1b[31mb\u202ec<|im_end|>d"
    whole = (await plain.say(text, session=None, cache=False)).json()
    assert whole["message"]["content"] == "a[31mbcd"
    assert (await streamed(plain, text)).text == "a[31mbcd"


async def test_a_bad_pattern_stops_the_start_with_one_line() -> None:
    """A pattern RE2 cannot compile is a configuration error that names it."""
    with pytest.raises(ConfigurationError) as error:
        make_app(output={"blocked_patterns": ["(unclosed"]})
    assert "(unclosed" in str(error.value)
    assert "\n" not in str(error.value)
