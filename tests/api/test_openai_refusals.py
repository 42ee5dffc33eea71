"""Fields that the OpenAI routes refuse, unless their value has no effect."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support.openai import chat, complete, refused

UNSUPPORTED, INVALID = "unsupported_parameter", "validation_error"

REFUSED: dict[str, tuple[Any, Any]] = {
    # field: a value with an effect, a value without one
    "audio": ({"voice": "alloy", "format": "mp3"}, None),
    "function_call": ({"name": "f"}, "auto"),
    "functions": ([{"name": "f"}], []),
    "metadata": ({"a": "b"}, {}),
    "modalities": (["text", "audio"], ["text"]),
    "moderation": ({"mode": "x"}, None),
    "prediction": ({"type": "content", "content": "x"}, None),
    "prompt_cache_key": ("k", None),
    "prompt_cache_options": ({"a": 1}, None),
    "prompt_cache_retention": ("24h", None),
    "reasoning_effort": ("high", "none"),
    "safety_identifier": ("u", None),
    "service_tier": ("flex", "auto"),
    "store": (True, False),
    "verbosity": ("low", "medium"),
    "web_search_options": ({}, None),
}
REFUSED_COMPLETION: dict[str, tuple[Any, Any]] = {
    "best_of": (2, 1),
    "echo": (True, False),
    "suffix": ("end", ""),
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_chat_field_is_refused(client: TestClient, field: str) -> None:
    """An unsupported field is 400 and named, unless its value has no effect."""
    asking, neutral = REFUSED[field]
    assert refused(chat(client, **{field: asking})) == (400, UNSUPPORTED, field)
    assert chat(client, **{field: neutral}).status_code == 200
    assert chat(client, **{field: None}).status_code == 200


@pytest.mark.parametrize("field", REFUSED_COMPLETION)
def test_a_completion_field_is_refused(client: TestClient, field: str) -> None:
    """An unsupported field of a completion is 400 and named, unless its value has no effect."""
    asking, neutral = REFUSED_COMPLETION[field]
    assert refused(complete(client, **{field: asking})) == (400, UNSUPPORTED, field)
    assert complete(client, **{field: neutral}).status_code == 200


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}

MESSAGES: list[tuple[Any, str, str]] = [
    ({"role": "wizard", "content": "x"}, INVALID, "messages.0.role"),
    ({"role": "user"}, INVALID, "messages.0"),
    ({"role": "user", "content": "x", "name": "jane"}, UNSUPPORTED, "messages.0.name"),
    ({"role": "user", "content": [IMAGE]}, UNSUPPORTED, "messages.0.content"),
    ({"role": "user", "content": [{"type": "text"}]}, INVALID, "messages.0.content"),
    ({"role": "tool", "content": "x"}, INVALID, "messages.0"),
    ({"role": "user", "content": "x", "tool_call_id": "c"}, INVALID, "messages.0"),
]


@pytest.mark.parametrize(("message", "code", "param"), MESSAGES)
def test_what_is_wrong_with_a_message_is_named(
    client: TestClient, message: Any, code: str, param: str
) -> None:
    """An invalid message is 400, and its index and field are named."""
    assert refused(chat(client, messages=[message])) == (400, code, param)


OBFUSCATED = {"stream": True, "stream_options": {"include_obfuscation": True}}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"foo": 1}, UNSUPPORTED, "foo"),
        ({"foo": None}, UNSUPPORTED, "foo"),
        (OBFUSCATED, UNSUPPORTED, "stream_options.include_obfuscation"),
        ({"stream_options": {"include_usage": True}}, INVALID, None),
        ({"messages": []}, INVALID, "messages"),
        ({"n": 0}, INVALID, "n"),
        ({"n": 17}, INVALID, "n"),
        ({"temperature": "1"}, INVALID, "temperature"),
        ({"temperature": True}, INVALID, "temperature"),
        ({"logit_bias": {"x": 1}}, INVALID, "logit_bias.x.[key]"),
        ({"logit_bias": {"5": 101}}, INVALID, "logit_bias.5"),
        ({"logit_bias": {"999999": 1}}, INVALID, "logit_bias"),
        ({"stop": ["a", "b", "c", "d", "e"]}, INVALID, "stop"),
        ({"max_tokens": 0}, INVALID, "max_tokens"),
        ({"max_tokens": 1_000_000}, INVALID, "max_tokens"),
        ({"top_logprobs": 21, "logprobs": True}, INVALID, "top_logprobs"),
        ({"tool_choice": "required"}, INVALID, None),
        ({"tool_choice": {"type": "allowed_tools"}}, INVALID, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, INVALID, "response_format"),
        ({"response_format": {"type": "grammar"}}, INVALID, "response_format.type"),
        ({"response_format": {"type": "json_object"}}, UNSUPPORTED, "response_format"),
    ],
)
def test_what_is_wrong_is_named(
    client: TestClient, fields: dict[str, Any], code: str, param: str | None
) -> None:
    """An invalid field is 400, as with OpenAI, and named."""
    assert refused(chat(client, **fields)) == (400, code, param)


def test_a_prompt_of_token_ids_is_refused(client: TestClient) -> None:
    """A prompt of token ids is 400."""
    for prompt in ([1, 2, 3], [[1], [2]]):
        assert refused(complete(client, prompt)) == (400, UNSUPPORTED, "prompt")
    assert refused(complete(client, []))[:2] == (400, INVALID)
    assert refused(complete(client, "")) == (400, INVALID, "prompt.0")
