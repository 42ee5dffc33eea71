"""Structured output on the routes, with a random model: answers match the schema."""

import json
import re
import time
from typing import Any

import httpx
import pytest
from jsonschema import validate
from msgspec import structs

from tests.conftest import RunApp
from tests.support.openai import CHAT, COMPLETIONS, refused, user
from tests.support.service import Service

CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
        "river": {"anyOf": [{"type": "string", "maxLength": 20}, {"type": "null"}]},
    },
    "required": ["name", "population", "river"],
    "additionalProperties": False,
}
OBJECT = {"type": "json_object"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": CITY}}
DATE = {"type": "regex", "regex": r"[12]\d{3}-(0[1-9]|1[0-2])-[0-3]\d"}
CHOICE = {"type": "choice", "choice": ["C++ (yes?)", "a|b", "none"]}


def post(service: Service, path: str, **fields: Any) -> httpx.Response:
    """One greedy request, with enough tokens for the forms above."""
    with service.client(timeout=200) as client:
        return client.post(path, json={"temperature": 0, "max_tokens": 150, **fields})


def chat(service: Service, **fields: Any) -> httpx.Response:
    """A chat about a city."""
    messages = user("Describe Paris as JSON.")
    return post(service, CHAT, **{"model": "default", "messages": messages, **fields})


def text_of(response: Any) -> str:
    """The text of a complete answer of any route."""
    assert response.status_code == 200, response.text
    answer = response.json()
    choice = answer.get("choices", [answer])[0]
    assert choice["finish_reason"] == "stop", answer
    text: str = choice.get("text") or choice.get("generated_text") or choice["message"]["content"]
    return text


def test_response_formats(tiny_service: Service) -> None:
    """A chat keeps each kind of response format."""
    validate(json.loads(text_of(chat(tiny_service, response_format=SCHEMA))), CITY)
    assert re.fullmatch(DATE["regex"], text_of(chat(tiny_service, response_format=DATE)))
    assert text_of(chat(tiny_service, response_format=CHOICE)) in CHOICE["choice"]
    formats: list[Any] = [{"type": "text"}, None]
    texts = [chat(tiny_service, response_format=f, max_tokens=16, cache=False) for f in formats]
    assert texts[0].json()["choices"] == texts[1].json()["choices"]
    # The object may be longer than max_tokens; then the text is the beginning of one.
    answer = chat(tiny_service, response_format=OBJECT, max_tokens=40).json()["choices"][0]
    assert answer["message"]["content"].startswith("{")
    if answer["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["message"]["content"]), dict)


def test_every_generating_route_has_them(tiny_service: Service) -> None:
    """The native routes and completions keep a format, too; so do the joined pieces of streams."""
    form = {"response_format": DATE}
    date = re.compile(DATE["regex"])
    assert date.fullmatch(text_of(post(tiny_service, "/v1/generate", prompt="On ", **form)))
    assert date.fullmatch(text_of(post(tiny_service, "/v1/chat", messages=user("When?"), **form)))
    completion = post(tiny_service, COMPLETIONS, model="default", prompt="On ", **form)
    assert date.fullmatch(text_of(completion))
    streamed = chat(tiny_service, stream=True, cache=False, **form).text.splitlines()
    chunks = [json.loads(line[6:]) for line in streamed if line.startswith("data: {")]
    deltas = [c["choices"][0]["delta"].get("content", "") for c in chunks]
    assert date.fullmatch("".join(deltas))


def test_redacted_answers_are_json(run_app: RunApp) -> None:
    """Where personal data is taken out of an answer, it stays JSON and its numbers numbers."""
    secret = {"to": "a\njane@example.com", "card": 4111111111111111}
    schema = {"enum": [secret]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    client = run_app(pii={"input": "off", "output": "redact"})
    # The echo engine knows no grammars, but repeats the one answer that this one leaves.
    engine = client.app.state.services.engine  # type: ignore[attr-defined]
    engine.info = structs.replace(engine.info, supported=engine.info.supported | {"grammar"})
    body = {"model": "echo", "messages": user(json.dumps(secret)), "response_format": form}
    answer = json.loads(text_of(client.post(CHAT, json=body)))
    assert answer == {**secret, "to": "a\n[EMAIL]"}


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"type": "object", "patternProperties": {"a": {}}}, "response_format"),
        ({"type": "string", "pattern": "(?=x)y"}, "response_format"),
        ({"type": "string", "pattern": "(((a{1000}){1000}){1000})"}, "response_format"),
        ({"type": "array", "items": {"type": "null"}, "minItems": 10**9}, "response_format"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "response_format"),
        ({"enum": ["x" * 70_000]}, "response_format"),
        ({"type": "object", "properties": {"a": {"type": "wizard"}}}, "response_format"),
    ],
    ids=["keyword", "lookahead", "regex", "array", "loop", "size", "type"],
)
def test_a_schema_that_cannot_be_honoured_is_refused(
    tiny_service: Service, form: dict[str, Any], param: str
) -> None:
    """An unsupported strict schema is 400 with the reason, in a response format and in a tool."""
    json_schema = {"name": "x", "schema": form, "strict": True}
    named = {"type": "json_schema", "json_schema": json_schema}
    began = time.monotonic()
    response = chat(tiny_service, response_format=named)
    assert refused(response) == (400, "invalid_grammar", param)
    # The bound is 200 ms; a test's margin is tenfold.
    assert time.monotonic() - began < 2
    function = {"name": "f", "parameters": form, "strict": True}
    tool = {"type": "function", "function": function}
    if form.get("type") == "object":
        response = chat(tiny_service, tools=[tool], tool_choice="required")
        assert refused(response) == (400, "invalid_grammar", "tools")


def test_a_refusal_names_the_place(tiny_service: Service) -> None:
    """The message names the place of a keyword that a strict schema may not have."""
    inner = {"type": "array", "items": {"type": "array", "uniqueItems": True}}
    form = {"type": "object", "properties": {"tags": inner}, "required": ["tags"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": form, "strict": True}}
    plain = {"type": "function", "function": {"name": "g"}}
    answer = chat(tiny_service, tools=[plain, tool])
    place = "tools.1.function.parameters.properties.tags.items: the keyword uniqueItems"
    assert place in answer.json()["error"]["message"]
    json_schema = {"name": "x", "schema": form, "strict": True}
    answer = chat(tiny_service, response_format={"type": "json_schema", "json_schema": json_schema})
    assert "response_format.json_schema.schema.properties.tags.items: the" in answer.text
    flat = {"type": "function", "name": "f", "parameters": form, "strict": True}
    other = {"type": "function", "name": "g"}
    allowed = {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "f"}],
    }
    text = {"format": {"type": "json_schema", "name": "x", "schema": form, "strict": True}}
    for fields, place, param in (
        ({"tools": [other, flat], "tool_choice": allowed}, "tools.1.parameters", "tools"),
        ({"text": text}, "text.format.schema", "text.format"),
    ):
        with tiny_service.client() as client:
            body = {"model": "default", "input": "x", **fields}
            answer = client.post("/v1/responses", json=body)
        assert refused(answer) == (400, "invalid_grammar", param)
        assert f" {place}.properties.tags.items: the" in answer.text
    native = {"type": "json_schema", "json_schema": {"schema": form}}
    with tiny_service.client() as client:
        answer = client.post("/v1/generate", json={"prompt": "x", "response_format": native})
    assert refused(answer) == (400, "invalid_grammar", "response_format")


def test_a_schema_that_is_not_strict_is_widened(tiny_service: Service) -> None:
    """A header names the keywords that an answer or a call need not follow; others hold."""
    members = {
        "kind": {"enum": ["a", "b"]},
        "when": {"type": "string", "maxLength": 9, "format": "iso-week"},
        "tags": {
            "type": "array",
            "items": {"enum": [*range(8)]},
            "uniqueItems": True,
            "maxItems": 3,
        },
    }
    form = {"type": "object", "properties": members, "required": list(members)}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": form}}
    answer = chat(tiny_service, response_format=named, max_tokens=100)
    assert answer.headers["X-Schema-Not-Held"] == "format, uniqueItems"
    value = json.loads(text_of(answer))
    assert value["kind"] in ("a", "b")
    assert len(value["when"]) <= 9
    assert len(value["tags"]) <= 3
    tool = {"type": "function", "function": {"name": "f", "parameters": form}}
    called = chat(tiny_service, tools=[tool], tool_choice="required", stream=True)
    assert called.headers["X-Schema-Not-Held"] == "format, uniqueItems"
    held = {**named, "json_schema": {"name": "x", "schema": {"type": "boolean"}}}
    assert "X-Schema-Not-Held" not in chat(tiny_service, response_format=held).headers


TWICE = {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2, "uniqueItems": True}
"""A schema whose only answer by the other keywords breaks the one that is not held."""


@pytest.mark.parametrize("kind", ["chat", "response", "tool"])
def test_an_answer_that_breaks_its_schema_is_told(tiny_service: Service, kind: str) -> None:
    """What was not held is checked: a header and a metric name the keywords that are broken."""
    members = {"a": TWICE, "b": {"not": {"const": False}, "type": "boolean"}}
    form = {"type": "object", "properties": members, "required": list(members)}
    metric = "llm_schema_violations_total"
    before = tiny_service.metric(metric, keyword="uniqueItems")
    if kind == "chat":
        named = {"type": "json_schema", "json_schema": {"name": "x", "schema": form}}
        answer = chat(tiny_service, response_format=named)
        value = json.loads(text_of(answer))
    elif kind == "response":
        named = {"type": "json_schema", "name": "x", "schema": form}
        body = {"model": "default", "input": "Answer.", "text": {"format": named}}
        with tiny_service.client(timeout=200) as client:
            answer = client.post("/v1/responses", json=body)
        value = json.loads(answer.json()["output"][0]["content"][0]["text"])
    else:
        tool = {"type": "function", "function": {"name": "f", "parameters": form}}
        answer = chat(tiny_service, tools=[tool], tool_choice="required", parallel_tool_calls=False)
        (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
        value = json.loads(call["function"]["arguments"])
    assert value["a"] == [1, 1]
    assert answer.headers["X-Schema-Not-Held"] == "not, uniqueItems"
    broken = answer.headers["X-Schema-Violations"]
    assert broken == ("uniqueItems" if value["b"] else "not, uniqueItems")
    assert tiny_service.metric(metric, keyword="uniqueItems") == before + 1
    assert tiny_service.lines(lambda e: e["message"] == f"an answer breaks its schema: {broken}")


def test_what_is_not_broken_is_not_told(tiny_service: Service) -> None:
    """An answer that follows what was not held, and one that was cut, have no such header."""
    twice = {**TWICE, "uniqueItems": True, "items": {"not": {"const": 2}, "type": "boolean"}}
    once = {**twice, "minItems": 1, "maxItems": 1}
    for schema, tokens in ((once, 100), (TWICE, 2)):
        named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = chat(tiny_service, response_format=named, max_tokens=tokens)
        assert "uniqueItems" in answer.headers["X-Schema-Not-Held"]
        assert "X-Schema-Violations" not in answer.headers


@pytest.mark.parametrize("extra", [{"min_tokens": 3}, {"ignore_eos": True}])
def test_a_form_ends_by_itself(tiny_service: Service, extra: dict[str, Any]) -> None:
    """What keeps an answer from ending is refused by name beside a form, and beside tools."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for form in ({"response_format": {"type": "json_object"}}, {"tools": [tool]}):
        answer = chat(tiny_service, **form, **extra)
        assert refused(answer) == (400, "unsupported_parameter", "min_tokens")


def test_a_bad_pattern_is_refused(tiny_service: Service) -> None:
    """An unsupported regular expression is 400 and named."""
    response = chat(tiny_service, response_format={"type": "regex", "regex": "(a"})
    assert refused(response) == (400, "invalid_grammar", "response_format")
