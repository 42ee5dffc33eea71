"""Reasoning on the chat routes: the echo engine, with the chat template of a model that reasons.

The prompt opens the reasoning, so that a message "thought</think>text" is echoed as both.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import pytest
from msgspec import structs
from starlette.testclient import TestClient

from app.llm.tokenizer import PromptTokenizer
from tests.conftest import running_app
from tests.data.chat_templates import CHATML
from tests.support.openai import chat, chunks, refused, respond, response_events, user
from tests.support.reasoning import teach
from tests.support.sse import data_lines

SAID = "I muse.\n</think>\n\nIt is so."
THOUGHT, TEXT = "I muse.", "It is so."


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """An application whose model reasons."""
    with running_app() as client:
        yield teach(client)


def native(client: TestClient, text: str = SAID, **fields: Any) -> Any:
    """One request to /v1/chat."""
    return client.post("/v1/chat", json={"messages": user(text), "cache": False, **fields})


def test_a_native_chat(client: TestClient) -> None:
    """The message has its reasoning beside its text, and the usage counts its tokens."""
    answer = native(client).json()
    assert answer["message"] == {"role": "assistant", "content": TEXT, "reasoning": THOUGHT}
    counted = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert len(THOUGHT) <= counted < answer["usage"]["completion_tokens"]
    off = native(client, "x", chat_template_kwargs={"enable_thinking": False}).json()
    assert off["message"] == {"role": "assistant", "content": "x"}
    assert "completion_tokens_details" not in off["usage"]


def runs(deltas: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the members of deltas come to, in their order."""
    found: list[tuple[str, str]] = []
    for name, text in [item for delta in deltas for item in delta.items()]:
        before = found.pop()[1] if found and found[-1][0] == name else ""
        found.append((name, before + text))
    return found


def test_a_native_stream(client: TestClient) -> None:
    """Reasoning has deltas of its own, before those of the text."""
    *lines, _ = data_lines(native(client, stream=True).text.splitlines())
    deltas = [json.loads(line)["delta"] for line in lines]
    assert len(deltas) > len(SAID) / 2
    assert runs(deltas) == [("role", "assistant"), ("reasoning", THOUGHT), ("content", TEXT)]


def test_chat_completions(client: TestClient) -> None:
    """OpenAI's chat has reasoning_content, whole and streamed, and counts its tokens."""
    answer = chat(client, SAID).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == (THOUGHT, TEXT)
    assert "reasoning" not in message
    counted = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    several = chat(client, SAID, n=2).json()
    assert several["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2 * counted
    assert [c["message"]["reasoning_content"] for c in several["choices"]] == [THOUGHT] * 2
    found = chunks(chat(client, SAID, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in found]
    assert runs(deltas[1:]) == [("reasoning_content", THOUGHT), ("content", TEXT)]


def test_log_probabilities_are_those_of_the_text(client: TestClient) -> None:
    """Log-probabilities come with the text that they are of, and not for reasoning."""
    whole = chat(client, SAID, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in whole) == TEXT
    for chunk in chunks(chat(client, SAID, logprobs=True, stream=True)):
        choice = chunk["choices"][0]
        if "reasoning_content" in choice["delta"]:
            assert choice["logprobs"] is None


def test_all_tokens_spent_on_reasoning(client: TestClient) -> None:
    """An answer that is cut inside its reasoning has an empty text, on every route."""
    choice = chat(client, SAID, max_tokens=6).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    assert choice["message"]["reasoning_content"] == "I muse"
    answer = native(client, max_tokens=6).json()
    assert (answer["message"]["content"], answer["finish_reason"]) == ("", "length")
    response = respond(client, SAID, max_output_tokens=6).json()
    assert response["status"] == "incomplete"
    (item,) = response["output"]
    assert (item["type"], item["status"]) == ("reasoning", "incomplete")


def test_responses(client: TestClient) -> None:
    """A response has an item of reasoning before its message, and its events in OpenAI's order."""
    events = response_events(respond(client, SAID, stream=True))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert [kind for kind, _ in groupby(kinds)] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    deltas = [e["delta"] for e in events if e["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == THOUGHT
    reasoning, message = events[-1]["response"]["output"]
    assert {e["item_id"] for e in events if "reasoning_text" in e["type"]} == {reasoning["id"]}
    assert reasoning == {
        "id": reasoning["id"],
        "type": "reasoning",
        "status": "completed",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": THOUGHT}],
    }
    assert message["content"][0]["text"] == TEXT
    whole = respond(client, SAID).json()
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message"]
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] >= len(THOUGHT)


def test_a_tool_is_called_behind_the_reasoning(client: TestClient) -> None:
    """Calls are read in the text alone: a call that the model thinks of is none."""
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "now"}}]
    message = chat(client, f"Shall I {call}?</think>{call}", tools=tools).json()["choices"][0]
    assert message["finish_reason"] == "tool_calls"
    assert message["message"]["reasoning_content"] == f"Shall I {call}?"
    assert len(message["message"]["tool_calls"]) == 1


# --- Requests -------------------------------------------------------------------------------------


def prompt_tokens(client: TestClient, messages: list[dict[str, Any]], **fields: Any) -> int:
    """Tokens of a prompt, of which each is a byte."""
    answer = chat(client, messages=[*messages, *user("x</think>y")], **fields).json()
    return int(answer["usage"]["prompt_tokens"])


def test_reasoning_that_comes_back_reaches_the_template(client: TestClient) -> None:
    """Reasoning of an earlier answer goes to a template that reads it, by any of its names."""
    bare = prompt_tokens(client, [{"role": "assistant", "content": "A"}])
    more = len("<think>Hm</think>")
    for name in ("reasoning_content", "reasoning"):
        for value, count in (("Hm", more), (None, 0), ({"a": 1}, 0), ("", 0)):
            said = {"role": "assistant", "content": "A", name: value}
            assert prompt_tokens(client, [said]) == bare + count, said
    body = [{"role": "assistant", "content": "A", "reasoning": "Hm"}, *user("x</think>y")]
    sent = client.post("/v1/chat", json={"messages": body}).json()
    assert sent["usage"]["prompt_tokens"] == bare + more
    thought: dict[str, Any] = {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "encrypted_content": None,
    }
    items = [{"role": "assistant", "content": "A"}, *user("x</think>y")]
    for content, count in (([{"type": "reasoning_text", "text": "Hm"}], more), (None, 0)):
        given = [{**thought, "content": content}, *items]
        assert respond(client, given).json()["usage"]["input_tokens"] == bare + count
    wrong = {"role": "user", "content": "x", "reasoning_content": "Hm"}
    assert refused(chat(client, messages=[wrong]))[0] == 400
    wrong = {"role": "user", "content": "x", "reasoning": "Hm"}
    assert client.post("/v1/chat", json={"messages": [wrong]}).status_code == 422


def test_a_session_keeps_answers_without_reasoning(client: TestClient) -> None:
    """A conversation, and a response that is continued, have the texts alone."""
    for _ in range(2):
        answer = native(client, session_id="s").json()
        assert answer["message"]["reasoning"] == THOUGHT
    kept = client.get("/v1/sessions/s").json()["messages"]
    assert [m["content"] for m in kept] == [SAID, TEXT] * 2
    client.delete("/v1/sessions/s")
    first = respond(client, SAID).json()
    second = respond(client, "x</think>y", previous_response_id=first["id"]).json()
    stated = [*user(SAID), {"role": "assistant", "content": TEXT}]
    assert second["usage"]["input_tokens"] == prompt_tokens(client, stated)
    # An item of a kept response may be named.
    named = [{"type": "item_reference", "id": first["output"][0]["id"]}]
    items = [*named, {"role": "assistant", "content": "A"}, *user("x")]
    assert respond(client, items).status_code == 200


def test_wishes(client: TestClient) -> None:
    """reasoning_effort and a switch reach the template; a budget ends the reasoning."""
    off: dict[str, Any] = {"reasoning_effort": "none"}
    for body in (off, {"chat_template_kwargs": {"enable_thinking": False}}):
        assert "reasoning_content" not in chat(client, "x", **body).json()["choices"][0]["message"]
        assert "reasoning" not in native(client, "x", **body).json()["message"]
    response = respond(client, "x", reasoning={"effort": "none"}).json()
    assert [item["type"] for item in response["output"]] == ["message"]
    assert response["reasoning"] == {"effort": "none"}
    for asked in (native, chat):
        answer = asked(client, "musing long", thinking_token_budget=4).json()
        message = answer["message"] if "message" in answer else answer["choices"][0]["message"]
        thought = message.get("reasoning") or message["reasoning_content"]
        assert (thought, message["content"]) == ("musi", "musing long")


def test_a_model_tells_that_it_reasons(client: TestClient) -> None:
    """The fields of reasoning are told of a model that reasons; of another one they are not."""
    engine = client.app.state.services.engine  # type: ignore[attr-defined]
    fields = {"reasoning", "reasoning_effort", "thinking_token_budget", "chat_template_kwargs"}
    card = client.get("/v1/models/default").json()
    assert fields <= set(card["supported_parameters"])
    before = engine.info, engine.tokenizer
    try:
        engine.info = structs.replace(engine.info, chat_template=CHATML)
        engine.tokenizer = PromptTokenizer(engine.info)
        card = client.get("/v1/models/default").json()
        assert fields.isdisjoint(card["supported_parameters"])
        engine.tokenizer.close()
    finally:
        engine.info, engine.tokenizer = before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs.a"),
        ({"chat_template_kwargs": {"a": "x" * 1025}}, "chat_template_kwargs.a"),
        ({"chat_template_kwargs": {f"v{i}": 1 for i in range(17)}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"unknown": 1}}, "chat_template_kwargs.unknown"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages"),
    ],
)
def test_what_cannot_be_asked(client: TestClient, fields: dict[str, Any], param: str) -> None:
    """A value of another kind, too many, and a variable that the template has not are refused."""
    status, _, named = refused(chat(client, "x", **fields))
    assert (status, (named or "").startswith(param)) == (400, True), named
    assert native(client, "x", **fields).status_code in (400, 422)


def test_a_model_that_does_not_reason(client: TestClient) -> None:
    """Its effort is refused by the name that the route has for it, but for none."""
    engine = client.app.state.services.engine  # type: ignore[attr-defined]
    before = engine.info, engine.tokenizer
    try:
        engine.info = structs.replace(engine.info, chat_template=CHATML)
        engine.tokenizer = PromptTokenizer(engine.info)
        high = {"reasoning": {"effort": "high"}}
        answer = respond(client, "x", **high)
        assert refused(answer) == (400, "unsupported_parameter", "reasoning.effort")
        assert answer.json()["error"]["message"].startswith("reasoning.effort: ")
        assert refused(chat(client, "x", reasoning_effort="high"))[2] == "reasoning_effort"
        for fields in ({"reasoning_effort": "none"}, {"thinking_token_budget": 9}):
            assert chat(client, "x", **fields).status_code == 200
        assert chat(client, SAID).json()["choices"][0]["message"]["content"] == SAID
        engine.tokenizer.close()
    finally:
        engine.info, engine.tokenizer = before


def test_kept_answers_are_for_the_same_wishes(client: TestClient) -> None:
    """A kept answer has its reasoning, and is not for a request with other wishes."""
    fields: list[dict[str, Any]] = [
        {},
        {"thinking_token_budget": 3},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"reasoning_effort": "none"},
    ]
    for wish in fields:
        first, second = (
            native(client, "kept</think>text", cache=True, temperature=0, **wish).json()
            for _ in range(2)
        )
        assert (first["cached"], second["cached"]) == (False, True), wish
        assert first["message"] == second["message"]
    headers = {"Idempotency-Key": "reasons"}
    whole = chat(client, SAID, stream=True, headers=headers)
    again = chat(client, SAID, stream=True, headers=headers)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert whole.text == again.text


def test_an_engine_that_dies_behind_the_reasoning() -> None:
    """The answer ends with an error; nothing of it is kept, and its place is free."""
    said: dict[str, Any] = {"thinking_token_budget": 2, "cache": True, "temperature": 0}
    with running_app(engine={"echo_step_seconds": 0.05}) as client, ThreadPoolExecutor() as pool:
        services = client.app.state.services  # type: ignore[attr-defined]
        value = services.metrics.registry.get_sample_value
        for stream in (True, False):
            teach(client)
            before = value("tokens_generated_total", {"model": "echo"}) or 0
            fields = {**said, "stream": stream, "headers": {"X-Session-ID": "s"}}
            asked = pool.submit(chat, client, "m" * 100, **fields)
            while (value("tokens_generated_total", {"model": "echo"}) or 0) < before + 5:
                time.sleep(0.01)
            assert client.portal is not None
            client.portal.call(services.engine.kill)
            answer = asked.result()
            if stream:
                *lines, last, done = data_lines(answer.text.splitlines())
                deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
                assert [name for name, _ in runs(deltas[1:])] == ["reasoning_content", "content"]
                assert done == "[DONE]"
                assert json.loads(last)["error"]["code"] == "engine_failed"
            else:
                assert refused(answer) == (500, "engine_failed", None)
            assert services.engine.queue.is_empty
            assert services.state.answers.statistics()["entries"] == 0
            assert client.get("/v1/sessions/s").status_code == 404
            while client.get("/readyz").status_code != 200:
                time.sleep(0.02)


# --- Screening ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def screened() -> Iterator[TestClient]:
    """An application that takes personal data and secrets out of answers."""
    with running_app(
        model={"reasoning_names": ["reasoning_content", "reasoning"]},
        pii={"input": "off", "output": "redact"},
        output={"blocked_patterns": ["secret"]},
    ) as client:
        yield teach(client)


MAIL = "ann@example.org"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "thought", "text", "reason"),
    [
        (f"To {MAIL}</think>To {MAIL}.", "To [EMAIL]", "To [EMAIL].", "stop"),
        ("no sec</think>ret", "no sec", "ret", "stop"),
        ("a secret</think>text", "a ", "", "content_filter"),
        ("thought</think>a secret", "thought", "a ", "content_filter"),
    ],
)
def test_reasoning_is_screened(
    screened: TestClient, said: str, thought: str, text: str, reason: str, *, stream: bool
) -> None:
    """Personal data leaves neither text, and a blocked pattern in either ends the answer."""
    answered = chat(screened, said, stream=stream)
    if stream:
        found = [chunk["choices"][0] for chunk in chunks(answered)]
        told = [{k: v for k, v in c["delta"].items() if k != "reasoning"} for c in found]
        parts = dict(runs(told[1:]))
        assert found[-1]["finish_reason"] == reason
    else:
        choice = answered.json()["choices"][0]
        parts = choice["message"]
        assert choice["finish_reason"] == reason
        assert parts["reasoning"] == parts["reasoning_content"]
    assert (parts["reasoning_content"], parts.get("content", "")) == (thought, text)
