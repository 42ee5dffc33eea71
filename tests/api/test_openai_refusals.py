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
    "modalities": (["text", "audio"], ["text"]),
    "moderation": ({"mode": "x"}, None),
    "prediction": ({"type": "content", "content": "x"}, None),
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


TEXT = {"type": "text", "text": "x"}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
IMAGE_FAULT = UNSUPPORTED, "messages.0.content.0.type"
CALL_FAULT = UNSUPPORTED, "messages.0.function_call"

MESSAGES: list[tuple[Any, str, str]] = [
    ({"role": "wizard", "content": "x"}, INVALID, "messages.0.role"),
    ({"role": "user"}, INVALID, "messages.0"),
    ({"role": "user", "content": None}, INVALID, "messages.0"),
    ({"role": "user", "content": 5}, INVALID, "messages.0.content"),
    ({"role": "user", "content": "x", "mood": "sad"}, UNSUPPORTED, "messages.0.mood"),
    ({"role": "user", "content": [TEXT, IMAGE]}, UNSUPPORTED, "messages.0.content.1.type"),
    ({"role": "tool", "content": [IMAGE], "tool_call_id": "c"}, *IMAGE_FAULT),
    (
        {"role": "user", "content": [{**TEXT, "lang": "de"}]},
        UNSUPPORTED,
        "messages.0.content.0.lang",
    ),
    ({"role": "user", "content": [{"type": "text"}]}, INVALID, "messages.0.content.0.text"),
    ({"role": "assistant", "function_call": {"name": "f"}}, *CALL_FAULT),
    ({"role": "tool", "content": "x"}, INVALID, "messages.0"),
    ({"role": "user", "content": "x", "tool_call_id": "c"}, INVALID, "messages.0"),
]


@pytest.mark.parametrize(("message", "code", "param"), MESSAGES)
def test_what_is_wrong_with_a_message_is_named(
    client: TestClient, message: Any, code: str, param: str
) -> None:
    """An invalid message is 400, and its index and field are named."""
    assert refused(chat(client, messages=[message])) == (400, code, param)


TOOL_X = "tools.0.function.x"
OBFUSCATED = {"stream": True, "stream_options": {"include_obfuscation": True}}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"foo": 1}, UNSUPPORTED, "foo"),
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
        ({"stop": list("abcdefghijklmnopq")}, INVALID, "stop"),
        ({"stop": ["a", 5]}, INVALID, "stop.1"),
        ({"top_k": -2}, INVALID, "top_k"),
        ({"min_tokens": -1}, INVALID, "min_tokens"),
        ({"tools": [{"type": "function", "function": {"name": "f", "x": 1}}]}, UNSUPPORTED, TOOL_X),
        ({"max_tokens": 0}, INVALID, "max_tokens"),
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


def test_an_empty_prompt_needs_a_token_that_begins_a_text(client: TestClient) -> None:
    """An empty prompt is 400 where the model has no token for the beginning of a text."""
    assert refused(complete(client, "")) == (400, INVALID, "prompt")
