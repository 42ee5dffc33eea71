"""POST /v1/responses over the echo engine: items, the events that make them, and fields."""

import json
from typing import Any

from jsonschema import validate
from starlette.testclient import TestClient

from tests.conftest import RunApp
from tests.support.openai import RESPONSES, chat, refused, respond, response_events
from tests.support.service import Service

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
NOW = {"type": "function", "name": "now"}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
ARGUMENTS = '{"city": "Rome"}'

BEGIN = ["created", "in_progress"]
MESSAGE = ["output_item.added", "content_part.added", "output_text.delta"]
MESSAGE_END = ["output_text.done", "content_part.done", "output_item.done"]
FUNCTION = ["output_item.added", "function_call_arguments.delta"]
FUNCTION_END = ["function_call_arguments.done", "output_item.done"]


def order(events: list[dict[str, Any]]) -> list[str]:
    """The events' types; those that follow each other as equals count once."""
    kinds = [event["type"].removeprefix("response.") for event in events]
    return [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]


def said(response: dict[str, Any]) -> str:
    """The text of a response's messages."""
    messages = [item for item in response["output"] if item["type"] == "message"]
    return "".join(part["text"] for item in messages for part in item["content"])


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """What two equal answers have in common."""
    output = [
        {k: v for k, v in o.items() if k not in ("id", "call_id")} for o in response["output"]
    ]
    varies = ("id", "created_at", "completed_at", "output")
    return {k: v for k, v in response.items() if k not in varies} | {"output": output}


# --- Shapes ---------------------------------------------------------------------------------------


def test_a_response_has_openais_shape(client: TestClient) -> None:
    """A whole response has the members of OpenAI's, and repeats the request."""
    answer = respond(client, instructions="Be kind.", metadata={"a": "b"}, max_output_tokens=9)
    response = answer.json()
    (item,) = response["output"]
    assert item.pop("id").startswith("msg_")
    part = {"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}
    assert item == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [part],
    }
    assert response["id"].startswith("resp_")
    assert response["completed_at"] >= response["created_at"] > 10**9
    usage = response["usage"]
    assert usage["output_tokens"] == len("hello") + 1
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    expected: dict[str, Any] = {
        "object": "response",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": "Be kind.",
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "model": "echo",
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": True,
        "temperature": 0.7,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
    }
    assert {name: response[name] for name in expected} == expected


def test_the_events_of_a_text(client: TestClient) -> None:
    """The events of a text come in OpenAI's order, and add up to the whole response."""
    events = response_events(respond(client, "Grüße, 世界!", stream=True))
    assert order(events) == [*BEGIN, *MESSAGE, *MESSAGE_END, "completed"]
    assert {e["output_index"] for e in events if "output_index" in e} == {0}
    assert {e["content_index"] for e in events if "content_index" in e} == {0}
    deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert len(deltas) > 5
    assert "".join(deltas) == "Grüße, 世界!"
    last = events[-1]["response"]
    assert {e["item_id"] for e in events if "item_id" in e} == {last["output"][0]["id"]}
    assert [e["response"]["status"] for e in events[:2]] == ["in_progress"] * 2
    assert events[0]["response"]["output"] == []
    whole = respond(client, "Grüße, 世界!").json()
    assert without_ids(last) == without_ids(whole)


def test_the_events_of_calls(client: TestClient) -> None:
    """Text and calls are an item each, in the answer's order, whole and streamed."""
    fields: dict[str, Any] = {"tools": [WEATHER, NOW]}
    text = f"Look:\n{CALL}{OTHER}"
    events = response_events(respond(client, text, stream=True, **fields))
    call = [*FUNCTION, *FUNCTION_END]
    assert order(events) == [*BEGIN, *MESSAGE, *MESSAGE_END, *call, *call, "completed"]
    last = events[-1]["response"]
    message, weather, now = last["output"]
    assert message["content"][0]["text"] == "Look:"
    assert (weather["name"], weather["arguments"]) == ("get_weather", ARGUMENTS)
    assert (now["name"], now["arguments"], now["status"]) == ("now", "{}", "completed")
    assert weather["id"] != now["id"]
    assert weather["call_id"] != now["call_id"]
    deltas = [
        e["delta"]
        for e in events
        if e["type"] == "response.function_call_arguments.delta" and e["item_id"] == weather["id"]
    ]
    assert len(deltas) > 5
    assert "".join(deltas) == ARGUMENTS
    whole = respond(client, text, **fields).json()
    assert without_ids(last) == without_ids(whole)


def test_an_empty_answer_is_an_empty_message(client: TestClient) -> None:
    """An answer without text has one message without text."""
    events = response_events(respond(client, stop="h", stream=True))
    assert [kind for kind in order(events) if "delta" in kind] == []
    assert said(events[-1]["response"]) == ""
    assert len(events[-1]["response"]["output"]) == 1


def test_max_output_tokens(client: TestClient) -> None:
    """An answer that is cut is incomplete, whole and streamed, with its last item."""
    for response in (
        respond(client, max_output_tokens=3).json(),
        response_events(respond(client, max_output_tokens=3, stream=True))[-1]["response"],
    ):
        assert (response["status"], said(response)) == ("incomplete", "hel")
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["output"][0]["status"] == "incomplete"
    events = response_events(
        respond(client, CALL, tools=[WEATHER], max_output_tokens=65, stream=True)
    )
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["output"][0]["status"] == "incomplete"
    over = respond(client, max_output_tokens=100_000)
    assert int(over.headers["X-Max-Tokens-Applied"]) < 100_000


def test_a_blocked_answer_is_incomplete(run_app: RunApp) -> None:
    """An answer that output.blocked_patterns ends is incomplete, with the reason."""
    client = run_app(output={"blocked_patterns": ["secret"]})
    response = respond(client, "a secret").json()
    assert response["incomplete_details"] == {"reason": "content_filter"}


def test_a_fault_in_a_stream_is_a_failed_response(client: TestClient) -> None:
    """A fault in mid-stream ends the stream with response.failed, which tells the error."""
    events = response_events(respond(client, "[echo:fault]", stream=True))
    assert order(events) == [*BEGIN, "failed"]
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "internal_error")
    assert refused(client.get(f"/v1/responses/{failed['id']}"))[0] == 404
    assert refused(respond(client, "[echo:fault]")) == (500, "internal_error", None)


def test_an_idempotency_key_repeats_a_stream(client: TestClient) -> None:
    """A stream that is complete is repeated byte for byte; one that failed is not."""
    for text, replayed in (("hello", "true"), ("[echo:fault]", None)):
        fields = {"stream": True, "headers": {"Idempotency-Key": f"responses {text}"}}
        first, second = (respond(client, text, **fields) for _ in range(2))
        assert second.headers.get("Idempotency-Replayed") == replayed
        assert (first.text == second.text) is (replayed is not None)


# --- Input ----------------------------------------------------------------------------------------


def tokens(client: TestClient, given: Any, **fields: Any) -> int:
    """Tokens of the prompt, of which each is a byte."""
    response = respond(client, given, **fields)
    assert response.status_code == 200, response.text
    count: int = response.json()["usage"]["input_tokens"]
    return count


def test_input_of_items(client: TestClient) -> None:
    """Items are the prompt that the same messages are as a chat."""
    function = {"name": "get_weather", "arguments": ARGUMENTS}
    calls = [{"id": i, "type": "function", "function": function} for i in ("c1", "c2")]
    messages = [
        {"role": "system", "content": "A"},
        {"role": "developer", "content": "B"},
        {"role": "user", "content": "C"},
        {"role": "assistant", "content": "D", "tool_calls": calls},
        {"role": "tool", "content": "E", "tool_call_id": "c1"},
        {"role": "tool", "content": "F", "tool_call_id": "c2"},
        {"role": "user", "content": "GH"},
    ]
    call = {"type": "function_call", "id": "fc_1", "status": "completed", **function}
    text = {"type": "output_text", "text": "D", "annotations": [], "logprobs": []}
    items = [
        {"role": "developer", "content": "B"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "C"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {
            "type": "message",
            "id": "m",
            "role": "assistant",
            "status": "completed",
            "content": [text],
        },
        {**call, "call_id": "c1"},
        {**call, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "E"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "F"}],
        },
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "G"}, {"type": "input_text", "text": "H"}],
        },
    ]
    asked = chat(client, messages=messages).json()["usage"]["prompt_tokens"]
    assert tokens(client, items, instructions="A") == asked
    assert said(respond(client, items).json()) == "GH"


# --- Fields ---------------------------------------------------------------------------------------


def test_instructions(client: TestClient) -> None:
    """Instructions are the system message, before those of the input."""
    assert tokens(client, "x", instructions="abc") == tokens(
        client, [{"role": "system", "content": "abc"}, {"role": "user", "content": "x"}]
    )


def test_response_logprobs(client: TestClient) -> None:
    """Log-probabilities are told of each token of the text, whole and in the deltas."""
    fields: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    (part,) = respond(client, "aé", **fields).json()["output"][0]["content"]
    assert bytes(b for entry in part["logprobs"] for b in entry["bytes"]).decode() == "aé"
    assert part["logprobs"][0]["top_logprobs"] == [{"token": "a", "logprob": 0.0, "bytes": [97]}]
    events = response_events(respond(client, "aé", stream=True, **fields))
    streamed = [e for e in events if e["type"] == "response.output_text.delta"]
    assert [entry for e in streamed for entry in e["logprobs"]] == part["logprobs"]
    done = next(e for e in events if e["type"] == "response.output_text.done")
    assert done["logprobs"] == part["logprobs"]


def test_response_tools(client: TestClient) -> None:
    """tool_choice none leaves text; allowed tools are all that the model is told of."""
    assert said(respond(client, CALL, tools=[WEATHER], tool_choice="none").json()) == CALL
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [NOW]}
    response = respond(client, CALL, tools=[WEATHER, NOW], tool_choice=allowed).json()
    assert said(response) == CALL
    assert response["usage"] == respond(client, CALL, tools=[NOW]).json()["usage"]
    assert response["tool_choice"] == allowed
    assert response["tools"][1] == {**NOW, "strict": False}
    huge = {**NOW, "parameters": {"type": "object", "properties": {}, "default": 10**300}}
    assert response_events(respond(client, tools=[huge], stream=True))


def test_response_formats_and_forced_calls(tiny_service: Service) -> None:
    """text.format holds the text to a schema, and tool_choice the answer to calls."""
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    fields = {"model": "default", "input": "The weather in Paris?", "temperature": 0}
    form = {"type": "json_schema", "name": "place", "schema": schema, "strict": True}
    calls = {"tools": [{**WEATHER, "parameters": schema}], "tool_choice": "required"}
    with tiny_service.client(timeout=200) as client:
        text = client.post(RESPONSES, json={**fields, "text": {"format": form}}).json()
        called = client.post(RESPONSES, json={**fields, **calls}).json()
    assert text["text"]["format"] == form
    (call, *_) = called["output"]
    for answer in (said(text), call["arguments"]):
        validate(json.loads(answer), schema)


def test_a_response_is_cached(client: TestClient) -> None:
    """A repeated request has the kept answer, under an id of its own, for one end user."""
    body: dict[str, Any] = {"given": "kept once as a response", "cache": True}
    first, second = (respond(client, **body, user="a").json() for _ in range(2))
    assert (first["cached"], second["cached"]) == (False, True)
    assert first["id"] != second["id"]
    assert respond(client, **body, user="b").json()["cached"] is False
