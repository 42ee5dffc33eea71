"""What POST /v1/responses refuses, and what it takes without effect."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.conftest import RunApp
from tests.support.openai import PLATFORM_HINTS, refused, respond, user

UNSUPPORTED, INVALID = "unsupported_parameter", "validation_error"
NOW = {"type": "function", "name": "now"}

IMAGE = {"type": "input_image", "image_url": "https://example.com/a.png"}
TEXT = {"type": "input_text", "text": "x"}
ITEMS: list[tuple[Any, str, str | None]] = [
    ({"role": "user", "content": [TEXT, IMAGE]}, UNSUPPORTED, "input.0.content.1.type"),
    (
        {"type": "function_call_output", "call_id": "c", "output": [IMAGE]},
        UNSUPPORTED,
        "input.0.output.0.type",
    ),
    ({"type": "computer_call", "id": "x"}, UNSUPPORTED, "input.0.type"),
    ({"type": ["message"], "role": "user", "content": "x"}, UNSUPPORTED, "input.0.type"),
    ({"role": "wizard", "content": "x"}, INVALID, "input.0.role"),
    ({"role": "user"}, INVALID, "input.0"),
    ({"role": "user", "content": None}, INVALID, "input.0"),
    ({"role": "user", "content": "x", "output": "y"}, INVALID, "input.0"),
    ({"role": "user", "content": "x", "mood": "sad"}, UNSUPPORTED, "input.0.mood"),
    ({"type": "function_call", "name": "f", "arguments": "{}"}, INVALID, "input.0"),
    ({"type": "reasoning", "summary": []}, INVALID, None),
    ("x", INVALID, "input.0"),
]


@pytest.mark.parametrize(("item", "code", "param"), ITEMS)
def test_what_is_wrong_with_an_item_is_named(
    client: TestClient, item: Any, code: str, param: str | None
) -> None:
    """An invalid item is 400, and its index and member are named."""
    assert refused(respond(client, [item])) == (400, code, param)


REFUSED: dict[str, tuple[Any, Any]] = {
    # field: a value with an effect, a value without one
    "access_programs": ({"cyber": "standard"}, None),
    "background": (True, False),
    "background_options": ({"completion_window": "2h"}, None),
    "context_management": ([{"type": "compaction"}], []),
    "image": ({"context_compression": "enabled"}, None),
    "moderation": ({"model": "omni-moderation-latest"}, None),
    "prompt": ({"id": "pmpt_1"}, None),
    "stream_options": ({"include_obfuscation": True}, {"include_obfuscation": False}),
}
HINTS: dict[str, Any] = {
    "max_tool_calls": 3,
    **PLATFORM_HINTS,
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_response_field_is_refused(client: TestClient, field: str) -> None:
    """An unsupported field is 400 and named, unless its value has no effect."""
    asking, neutral = REFUSED[field]
    assert refused(respond(client, **{field: asking})) == (400, UNSUPPORTED, field)
    assert respond(client, **{field: neutral}).status_code == 200


def test_a_responses_hint_is_taken(client: TestClient) -> None:
    """A hint is taken without effect, counted, and repeated where OpenAI repeats it."""

    def counted(field: str) -> float:
        line = f'llm_ignored_fields_total{{field="{field}"}} '
        found = [x for x in client.get("/metrics").text.splitlines() if x.startswith(line)]
        return float(found[0].removeprefix(line)) if found else 0

    before = {field: counted(field) for field in HINTS}
    response = respond(client, **HINTS).json()
    assert {f: counted(f) - before[f] for f in HINTS} == dict.fromkeys(HINTS, 1)
    for field in ("metadata", "prompt_cache_key", "safety_identifier"):
        assert response[field] == HINTS[field]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"foo": 1}, UNSUPPORTED, "foo"),
        ({"messages": user("x")}, UNSUPPORTED, "messages"),
        ({"max_tokens": 5}, UNSUPPORTED, "max_tokens"),
        ({"n": 1}, UNSUPPORTED, "n"),
        ({"input": []}, INVALID, "input"),
        ({"max_output_tokens": 0}, INVALID, "max_output_tokens"),
        ({"top_logprobs": 21}, INVALID, "top_logprobs"),
        ({"include": ["file_search_call.results"]}, INVALID, "include.0"),
        ({"conversation": "not a name"}, INVALID, "conversation"),
        ({"conversation": "a", "previous_response_id": "b"}, INVALID, None),
        ({"truncation": "auto"}, INVALID, None),
        ({"reasoning": {"effort": "high"}}, UNSUPPORTED, "reasoning.effort"),
        ({"tools": [{"type": "web_search"}]}, UNSUPPORTED, "tools.0.type"),
        ({"tools": [{**NOW, "x": 1}]}, UNSUPPORTED, "tools.0.x"),
        ({"tools": [{**NOW, "defer_loading": True}]}, UNSUPPORTED, "tools.0.defer_loading"),
        ({"tools": [NOW, NOW]}, INVALID, None),
        ({"tool_choice": "required"}, INVALID, None),
        ({"tools": [NOW], "tool_choice": "required"}, UNSUPPORTED, "tools"),
        ({"tool_choice": {"type": "function", "name": "x"}}, INVALID, None),
        ({"tool_choice": {"type": "file_search"}}, UNSUPPORTED, "tool_choice.type"),
        ({"text": {"format": {"type": "json_schema"}}}, INVALID, "text.format"),
        ({"text": {"format": {"type": "grammar"}}}, INVALID, "text.format.type"),
        ({"text": {"format": {"type": "json_object"}}}, UNSUPPORTED, "text.format"),
        ({"model": "gpt-4o"}, "model_not_found", "model"),
    ],
)
def test_what_is_wrong_with_a_response_is_named(
    client: TestClient, fields: dict[str, Any], code: str, param: str | None
) -> None:
    """An invalid field is refused before anything runs, by its name on this route."""
    status = 404 if code == "model_not_found" else 400
    assert refused(respond(client, **fields)) == (status, code, param)


def test_the_limit_on_a_prompt_names_the_input(run_app: RunApp) -> None:
    """What the services refuse is named as this route names it; instructions count."""
    client = run_app(security={"max_prompt_chars": 10}, model={"max_tokens_policy": "refuse"})
    assert refused(respond(client, "x" * 11)) == (400, "prompt_too_long", "input")
    assert refused(respond(client, "x", instructions="y" * 10))[1] == "prompt_too_long"
    over = respond(client, "x", max_output_tokens=100_000)
    assert refused(over) == (400, INVALID, "max_output_tokens")
