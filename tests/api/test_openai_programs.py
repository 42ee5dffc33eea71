"""What the ordinary programs of OpenAI's clients send is taken on the first try."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from app.api.openai.responses.request import ResponsesRequest
from app.api.openai.schemas import ChatCompletionRequest, CompletionRequest
from tests.conftest import RunApp
from tests.support.openai import PLATFORM_HINTS, chat, chunks, complete, refused, user

# Fields without effect, with values of their clients.
HINTS: dict[str, Any] = {
    **PLATFORM_HINTS,
    "store": True,
    "verbosity": "low",
}
EPHEMERAL = {"type": "ephemeral"}
FUNCTION = {"name": "f", "arguments": '{"a": 1}'}

# Earlier answers, as clients send them back.
ANSWERS: dict[str, dict[str, Any]] = {
    "of this service": {"content": "B", "refusal": None},
    "of OpenAI": {
        "content": "B",
        "refusal": None,
        "annotations": [{"type": "url_citation", "url_citation": {"url": "x"}}],
        "audio": None,
        "function_call": None,
    },
    "of a reasoning model": {"content": "B", "reasoning_content": "Hm.", "reasoning": "Hm."},
    "through LiteLLM": {
        "content": "B",
        "provider_specific_fields": {"thinking_blocks": []},
        "thinking_blocks": [{"type": "thinking", "thinking": "Hm."}],
        "images": [],
    },
    "a refusal": {"content": None, "refusal": "B"},
    "parts": {
        "content": [
            {"type": "thinking", "thinking": "Hm."},
            {"type": "text", "text": "B", "annotations": []},
        ]
    },
    "a refusal as a part": {"content": [{"type": "refusal", "refusal": "B"}]},
    "with a name": {"content": "B", "name": "planner"},
    "with a tool_call_id": {"content": "B", "tool_call_id": None, "tool_calls": None},
}
CALLS: dict[str, dict[str, Any]] = {
    "of this service": {"id": "c", "type": "function", "function": FUNCTION},
    "joined from a stream": {"index": 0, "id": "c", "type": "function", "function": FUNCTION},
    "with a description": {
        "id": "c",
        "type": "function",
        "function": {**FUNCTION, "description": "F", "parsed_arguments": {"a": 1}},
    },
    "of Gemini": {
        "id": "c",
        "type": "function",
        "function": FUNCTION,
        "extra_content": {"google": {"thought_signature": "s" * 500}},
    },
    "without an id": {"type": "function", "function": FUNCTION},
    "with a long id": {"id": "call_" + "x" * 500, "type": "function", "function": FUNCTION},
    "with arguments that are no text": {
        "id": "c",
        "type": "function",
        "function": {"name": "f", "arguments": {"a": 1}},
    },
    "of a namespace": {"id": "c", "function": FUNCTION, "provider_specific_fields": None},
}


def ignored(client: TestClient) -> dict[str, float]:
    """How often each field was taken without effect."""
    lines = [x for x in client.get("/metrics").text.splitlines() if "ignored_fields_total{" in x]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


@pytest.mark.parametrize("field", HINTS)
def test_a_hint_is_taken(client: TestClient, field: str) -> None:
    """A field that asks nothing of the answer changes nothing, and is counted once."""
    before = ignored(client).get(field, 0)
    answer = chat(client, **{field: HINTS[field]})
    assert answer.json()["choices"] == chat(client).json()["choices"]
    assert chat(client, **{field: None}).status_code == 200
    assert ignored(client)[field] == before + 1


def test_hints_in_messages_and_tools_are_taken(client: TestClient) -> None:
    """Hints inside messages, their parts and tools are taken and counted too."""
    before = ignored(client)
    part = {"type": "text", "text": "hello", "cache_control": EPHEMERAL, "annotations": []}
    messages = [
        {"role": "system", "content": "S", "name": "rules"},
        {"role": "user", "content": [part], "name": "jane", "cache_control": EPHEMERAL},
    ]
    tool = {
        "type": "function",
        "function": {"name": "f", "cache_control": EPHEMERAL},
        "cache_control": EPHEMERAL,
    }
    answer = chat(client, messages=messages, tools=[tool])
    assert answer.json()["choices"][0]["message"]["content"] == "hello"
    counted = {name: count - before.get(name, 0) for name, count in ignored(client).items()}
    assert {name: counted[name] for name in ("name", "cache_control", "annotations")} == {
        "name": 2,
        "cache_control": 4,
        "annotations": 1,
    }


@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_is_taken_back(client: TestClient, kind: str) -> None:
    """An earlier answer reads the same whatever it carries beside its text."""
    expected, sent = (
        client.post("/v1/tokenize", json={"messages": [*user("A"), {"role": "assistant", **m}]})
        for m in ({"content": "B"}, ANSWERS[kind])
    )
    assert sent.json() == expected.json()


@pytest.mark.parametrize("kind", CALLS)
def test_a_call_is_taken_back(client: TestClient, kind: str) -> None:
    """An earlier call reads the same whatever it carries beside its function."""
    result = {"role": "tool", "content": "D", "tool_call_id": "c", "name": "f"}
    expected, sent = (
        client.post(
            "/v1/tokenize",
            json={"messages": [*user("A"), {"role": "assistant", "tool_calls": [call]}, result]},
        )
        for call in (CALLS["of this service"], CALLS[kind])
    )
    assert sent.json() == expected.json()


def test_options_of_a_stream_are_taken(client: TestClient) -> None:
    """What load generators want beside the usage is a hint: the usage comes at the end."""
    before = ignored(client).get("continuous_usage_stats", 0)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *_, last = chunks(chat(client, stream=True, stream_options=options))
    assert last["usage"]["completion_tokens"] == len("hello") + 1
    assert ignored(client)["continuous_usage_stats"] == before + 1


def test_some_of_the_tools_are_allowed(client: TestClient) -> None:
    """With allowed_tools the others are as if they were not there."""
    f, g = ({"type": "function", "function": {"name": name}} for name in "fg")

    def asked(tools: list[Any], mode: str, **fields: Any) -> Any:
        allowed = {"mode": mode, "tools": tools}
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
        return chat(client, tools=[f, g], tool_choice=choice, **fields)

    alone = chat(client, tools=[g]).json()
    assert asked([g], "auto").json()["usage"] == alone["usage"]
    # The echo engine cannot be made to call.
    assert refused(asked([g], "required"))[1:] == ("unsupported_parameter", "tools")
    unknown = {"type": "function", "function": {"name": "h"}}
    assert refused(asked([unknown], "auto"))[:2] == (400, "validation_error")


def test_null_asks_for_nothing(client: TestClient) -> None:
    """A null is taken in every field, in those that this service does not have too."""
    fields = {"foo": None, "audio": None, "tools": None, "stream_options": None, "top_a": None}
    message = {"role": "user", "content": "hello", "tool_calls": None, "mood": None}
    form = {"type": "text", "json_schema": None, "schema": None}
    answer = chat(client, messages=[message], response_format=form, **fields)
    assert answer.json()["choices"] == chat(client).json()["choices"]


def test_ignore_eos_fills_the_answer(client: TestClient) -> None:
    """ignore_eos fills the answer up to max_tokens, and min_tokens up to its own number."""
    filled = complete(client, "abc", max_tokens=50, ignore_eos=True).json()
    assert filled["usage"]["completion_tokens"] == 50
    assert filled["choices"][0]["finish_reason"] == "length"
    longer = chat(client, "abc", max_completion_tokens=50, min_tokens=7).json()
    assert 7 < longer["usage"]["completion_tokens"] < 50
    assert longer["choices"][0]["finish_reason"] == "stop"


def test_top_p_0_is_greedy(client: TestClient) -> None:
    """top_p 0 takes the likeliest token, top_k -1 all of them."""
    assert chat(client, top_p=0, temperature=1, seed=3).status_code == 200
    assert complete(client, top_k=-1, top_p=0.0).status_code == 200


def test_sixteen_stop_strings(client: TestClient) -> None:
    """Up to sixteen stop strings are honoured; empty ones stop nothing."""
    stop = ["", *"abcdfgijkmnpqrs", "l", ""]
    assert chat(client, stop=stop).json()["choices"][0]["message"]["content"] == "he"
    assert chat(client, stop="").json()["choices"][0]["message"]["content"] == "hello"


def test_max_tokens_over_the_most_is_cut(client: TestClient) -> None:
    """A larger max_tokens is cut to model.max_tokens, as a header of every answer tells."""
    for fields in ({}, {"stream": True}, {"stream": True, "n": 2}):
        cut = chat(client, max_tokens=1_000_000, **fields)
        assert (cut.status_code, cut.headers["X-Max-Tokens-Applied"]) == (200, "512")
    long = complete(client, "x" * 600, max_tokens=700)
    assert long.headers["X-Max-Tokens-Applied"] == "512"
    assert long.json()["choices"][0]["finish_reason"] == "length"
    assert long.json()["usage"]["completion_tokens"] == 512
    assert "X-Max-Tokens-Applied" not in chat(client, max_tokens=512).headers


def test_max_tokens_over_the_most_is_refused_where_that_is_set(run_app: RunApp) -> None:
    """With model.max_tokens_policy refuse, and on the native routes always, it is refused."""
    client = run_app(model={"max_tokens_policy": "refuse"})
    assert refused(chat(client, max_tokens=513)) == (400, "validation_error", "max_tokens")
    native = client.post("/v1/generate", json={"prompt": "x", "max_tokens": 513})
    assert refused(native) == (422, "validation_error", "max_tokens")


def test_a_model_tells_what_it_takes(client: TestClient) -> None:
    """The model's card has what a program needs before it asks for tokens."""
    card = client.get("/v1/models/default").json()
    status = client.get("/status").json()
    assert card["context_length"] == status["engine"]["context_length"]
    assert card["max_tokens"] == status["limits"]["max_tokens"]
    assert card["supported_parameters"] == status["engine"]["supported_parameters"]
    honoured = {
        name
        for body in (ChatCompletionRequest, CompletionRequest, ResponsesRequest)
        for name, field in body.model_fields.items()
        if field.description != "Taken, without effect."
    }
    # The echo engine has no grammars, and its model no reasoning.
    unable = {"response_format", "chat_template_kwargs"}
    unable |= {"reasoning", "reasoning_effort", "thinking_token_budget"}
    assert unable < honoured
    assert set(card["supported_parameters"]) == honoured - unable
