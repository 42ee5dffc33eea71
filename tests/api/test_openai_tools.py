"""Tools on the OpenAI routes: the prompt of the model, and the calls in the answer."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import validate
from msgspec import structs
from starlette.testclient import TestClient

from app.llm.tokenizer import PromptTokenizer
from tests.conftest import RunApp, running_app
from tests.data.call_templates import CALL_TOKENS
from tests.data.chat_templates import CHATML
from tests.support.openai import CHAT, chat, chunks, refused, user
from tests.support.scripted import described
from tests.support.service import Service

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def called(choice: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and arguments of a choice's calls."""
    calls = choice["message"].get("tool_calls", [])
    assert all(c["type"] == "function" for c in calls)
    assert len({c["id"] for c in calls}) == len(calls)
    return [(c["function"]["name"], c["function"]["arguments"]) for c in calls]


def test_tools_called(client: TestClient) -> None:
    """A call is in tool_calls, with the reason tool_calls; other text stays text."""
    (choice,) = chat(client, f"Look:\n{CALL}", tools=[WEATHER, NOW]).json()["choices"]
    assert called(choice) == [("get_weather", '{"city": "Köln"}')]
    assert choice["message"]["content"] == "Look:"
    assert choice["finish_reason"] == "tool_calls"
    (only,) = chat(client, CALL, tools=[WEATHER]).json()["choices"]
    assert only["message"]["content"] is None
    (none,) = chat(client, "no call", tools=[WEATHER]).json()["choices"]
    assert (none["message"]["content"], none["finish_reason"]) == ("no call", "stop")
    assert "tool_calls" not in none["message"]


def test_streamed_calls(client: TestClient) -> None:
    """A streamed call has its id and name first, then its arguments in pieces."""
    text = CALL.replace("Köln", "Rom") + CALL
    found = chunks(chat(client, text, tools=[WEATHER], stream=True))
    deltas = [c["choices"][0]["delta"] for c in found]
    pieces = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert {p["index"] for p in pieces} == {0, 1}
    for index in (0, 1):
        first, *rest = [p for p in pieces if p["index"] == index]
        assert first["function"] == {"name": "get_weather", "arguments": ""}
        assert first["id"]
        assert first["type"] == "function"
        assert len(rest) > 5
        assert all(p.keys() == {"index", "function"} for p in rest)
        said = "".join(p["function"]["arguments"] for p in rest)
        assert json.loads(said) == {"city": ("Rom", "Köln")[index]}
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert not any(delta.get("content") for delta in deltas)


def test_a_repeated_call_ends_the_answer(run_app: RunApp) -> None:
    """A call that repeats an earlier one ends the answer, whole and streamed, and is not told."""
    client = run_app(engine={"echo_step_seconds": 0.002})
    text = f"{CALL}{CALL}" + "x" * 300
    whole = chat(client, text, tools=[WEATHER]).json()
    (choice,) = whole["choices"]
    assert called(choice) == [("get_weather", '{"city": "Köln"}')]
    assert choice["finish_reason"] == "tool_calls"
    # The engine hears of it while it generates the next few tokens of three hundred.
    assert whole["usage"]["completion_tokens"] < len(text.encode()) - 100
    found = chunks(chat(client, text, tools=[WEATHER], stream=True))
    calls = [p for c in found for p in c["choices"][0]["delta"].get("tool_calls", [])]
    assert {p["index"] for p in calls} == {0}
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_an_answer_without_tools_keeps_what_looks_like_a_call(client: TestClient) -> None:
    """Without tools, or with tool_choice none, the text is as the model wrote it."""
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        (choice,) = chat(client, CALL, **fields).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
    (other,) = chat(client, CALL, tools=[NOW]).json()["choices"]
    assert (other["message"]["content"], other["finish_reason"]) == (CALL, "stop")


def test_a_kept_answer_has_its_calls(client: TestClient) -> None:
    """A cached answer has its calls; other tools make another request."""
    text = f"cached {CALL}"
    answers = [chat(client, text, tools=[WEATHER], cache=True).json() for _ in range(2)]
    assert [a["cached"] for a in answers] == [False, True]
    assert [called(a["choices"][0])[0][0] for a in answers] == ["get_weather"] * 2
    other = chat(client, text, tools=[WEATHER, NOW], cache=True).json()
    assert other["cached"] is False


def test_the_model_is_told_of_tools(client: TestClient) -> None:
    """Definitions of tools are part of the prompt, and are counted."""
    told = chat(client, tools=[WEATHER]).json()["usage"]["prompt_tokens"]
    untold = chat(client).json()["usage"]["prompt_tokens"]
    assert told - untold > len(json.dumps(WEATHER))
    none = chat(client, tools=[WEATHER], tool_choice="none").json()["usage"]["prompt_tokens"]
    assert none == untold


def test_a_schema_may_have_numbers_of_any_size(client: TestClient) -> None:
    """A schema with an integer beyond 64 bits is accepted."""
    for number in (2**64, -(2**63) - 1, 10**300):
        parameters = {"type": "object", "properties": {}, "default": number}
        tool = {"type": "function", "function": {"name": "now", "parameters": parameters}}
        assert chat(client, "hello", tools=[tool], cache=True).status_code == 200


def test_tools_are_a_prompt(run_app: RunApp) -> None:
    """Limits and PII rules hold for definitions of tools, and for calls in the history."""
    client = run_app(security={"max_prompt_chars": 400}, pii={"input": "reject"})
    long = {"type": "function", "function": {"name": "f", "description": "x" * 400}}
    assert refused(chat(client, tools=[long])) == (400, "prompt_too_long", "messages")
    mail = {"type": "function", "function": {"name": "f", "description": "Ask jane@example.com."}}
    assert refused(chat(client, tools=[mail])) == (400, "pii_detected", "tools")
    for address in ("jane@example.com", r"jane\u0040example.com"):
        function = {"name": "f", "arguments": f'{{"to": "{address}"}}'}
        call = {"id": "c", "type": "function", "function": function}
        turns = [*user("x"), {"role": "assistant", "tool_calls": [call]}, *user("y")]
        assert refused(chat(client, messages=turns)) == (400, "pii_detected", "messages")


@pytest.fixture(scope="module")
def redacting() -> Iterator[TestClient]:
    """An application that takes personal data out of answers."""
    with running_app(pii={"input": "off", "output": "redact"}) as client:
        yield client


def test_redacted_arguments_are_json(redacting: TestClient) -> None:
    """Arguments stay JSON where personal data is taken out, whole and streamed."""
    text = CALL.replace("K\u00f6ln", r"a\njane\u0040example.com").replace(
        "}}", ', "card": 4111111111111111}}'
    )
    arguments = r'{"city": "a\n[EMAIL]", "card": 4111111111111111}'
    (choice,) = chat(redacting, text, tools=[WEATHER]).json()["choices"]
    assert called(choice) == [("get_weather", arguments)]
    found = chunks(chat(redacting, text, tools=[WEATHER], stream=True))
    deltas = [c["choices"][0]["delta"] for c in found]
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert "".join(call["function"]["arguments"] for call in calls) == arguments


def test_a_session_keeps_calls_and_results(client: TestClient) -> None:
    """A session continues with a tool's result alone; its history has the call."""
    session = {"headers": {"X-Session-ID": "with-tools"}, "tools": [WEATHER]}
    (choice,) = chat(client, CALL, **session).json()["choices"]
    call = choice["message"]["tool_calls"][0]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "12 degrees"}
    assert chat(client, messages=[result], **session).status_code == 200
    history = client.get("/v1/sessions/with-tools").json()["messages"]
    assert [m["role"] for m in history] == ["user", "assistant", "tool", "assistant"]
    assert (history[1]["content"], history[2]["content"]) == (CALL, "12 degrees")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, None),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "x"}}}, None),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [NOW] * 129}, "tools"),
    ],
)
def test_what_is_wrong_with_tools_is_named(
    client: TestClient, fields: dict[str, Any], param: str | None
) -> None:
    """Invalid definitions are 400 before anything runs."""
    assert refused(chat(client, **fields)) == (400, "validation_error", param)


def test_an_engine_without_grammars_cannot_be_made_to_call(client: TestClient) -> None:
    """tool_choice required is 400 on an engine without grammars."""
    response = chat(client, tools=[NOW], tool_choice="required")
    assert refused(response) == (400, "unsupported_parameter", "tools")


def ask(service: Service, **fields: Any) -> dict[str, Any]:
    """The one choice of a greedy answer of a random model."""
    body = {
        "model": "default",
        "messages": user("What is the weather in Paris, in celsius?"),
        "tools": [WEATHER, NOW],
        "temperature": 0,
        "max_tokens": 120,
        **fields,
    }
    with service.client(timeout=200) as client:
        response = client.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def test_tool_choices(tiny_service: Service) -> None:
    """A required call has arguments of the schema; there is one unless calls may be parallel."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    forced = ask(tiny_service, tool_choice=named)
    ((name, arguments),) = called(forced)
    assert name == "get_weather"
    validate(json.loads(arguments), WEATHER["function"]["parameters"])  # type: ignore[index]
    assert forced["finish_reason"] == "tool_calls"
    assert forced["message"]["content"] is None
    required = called(ask(tiny_service, tool_choice="required", parallel_tool_calls=False))
    assert len(required) == 1
    assert required[0][0] in ("get_weather", "now")
    none = ask(tiny_service, tool_choice="none", max_tokens=12)
    assert called(none) == []
    assert none["message"]["content"]
    nothing = {"type": "function", "function": {"name": "now"}}
    assert called(ask(tiny_service, tool_choice=nothing)) == [("now", "{}")]


def test_tools_beside_a_response_format(tiny_service: Service) -> None:
    """With auto the answer is a call or of the schema, with required it is a call."""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    for fields in ({}, {"messages": user('Answer with {"ok": true}.')}, {"tools": [NOW]}):
        auto = ask(tiny_service, response_format=form, **fields)
        if not called(auto):
            validate(json.loads(auto["message"]["content"]), schema)
    required = ask(tiny_service, response_format=form, tools=[NOW], tool_choice="required")
    assert called(required)
    assert required["finish_reason"] == "tool_calls"
    assert required["message"]["content"] is None


_CALLS, _CALLED, _CALL, _END, _SEP = CALL_TOKENS
HEADER = "<|channel|>commentary to="
# For each model the texts in its template that show its form, its special tokens, and a call.
OWN_FORMS = {
    "mistral": (
        "[TOOL_CALLS]",
        ("[TOOL_CALLS]",),
        '[TOOL_CALLS] [{"name": "now", "arguments": {"by": "ann@example.com"}}]',
    ),
    "qwen 3.5": (
        "<tool_call><function=<parameter=",
        (),
        "<tool_call>\n<function=now>\n<parameter=by>\nann@example.com\n</parameter>\n</function>\n",
    ),
    "gemma 4": (
        "<|tool_call><tool_call|>",
        ("<|tool_call>", "<tool_call|>", '<|"|>'),
        '<|tool_call>call:now{by:<|"|>ann@example.com<|"|>}<tool_call|>',
    ),
    "deepseek": (
        f"{_CALLS}{_SEP}",
        CALL_TOKENS,
        f'{_CALLS}{_CALL}now{_SEP}{{"by": "ann@example.com"}}{_END}{_CALLED}',
    ),
    "gpt-oss": (
        "<|channel|><|call|>",
        ("<|channel|>", "<|message|>", "<|constrain|>", "<|call|>"),
        f'{HEADER}functions.now<|constrain|>json<|message|>{{"by": "ann@example.com"}}',
    ),
}


def test_calls_in_a_models_own_form(redacting: TestClient) -> None:
    """Marks leave only answers without tools; arguments are redacted as JSON, streamed too."""
    engine = redacting.app.state.services.engine  # type: ignore[attr-defined]
    before = engine.info
    expected = [("now", '{"by": "[EMAIL]"}')]
    for signs, special, text in OWN_FORMS.values():
        template = CHATML + f"{{# tools {signs} #}}"
        model = described(template, special)
        engine.info = structs.replace(
            engine.info, chat_template=template, tokenizer_json=model.tokenizer_json
        )
        engine.tokenizer.close()
        engine.tokenizer = PromptTokenizer(engine.info)
        (choice,) = chat(redacting, text, tools=[NOW]).json()["choices"]
        assert called(choice) == expected
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")
        found = chunks(chat(redacting, text, tools=[NOW], stream=True))
        pieces = [p for c in found for p in c["choices"][0]["delta"].get("tool_calls", [])]
        assert [pieces[0]["function"]["name"]] == ["now"]
        assert "".join(p["function"]["arguments"] for p in pieces) == expected[0][1]
        (plain,) = chat(redacting, text).json()["choices"]
        assert not any(mark in plain["message"]["content"] for mark in special if mark in signs)
    engine.info = before
    engine.tokenizer.close()
    engine.tokenizer = PromptTokenizer(before)
