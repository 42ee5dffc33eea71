"""Responses that are kept: continued, branched, referred to, read, and deleted."""

from typing import Any

from starlette.testclient import TestClient

from tests.conftest import RunApp
from tests.support.openai import refused, respond, response_events
from tests.support.service import OTHER_KEY

NOT_FOUND = "response_not_found"
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
NOW = {"type": "function", "name": "now"}


def ask(client: TestClient, given: Any, **fields: Any) -> dict[str, Any]:
    """A response that was not refused."""
    response = respond(client, given, **fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def message(role: str, text: str) -> dict[str, str]:
    """A message as an item."""
    return {"role": role, "content": text}


def in_full(client: TestClient, *texts: str, **fields: Any) -> int:
    """Tokens of a prompt whose messages are all sent; each is a byte."""
    roles = ("user", "assistant")
    items = [message(roles[i % 2], text) for i, text in enumerate(texts)]
    count: int = ask(client, items, store=False, **fields)["usage"]["input_tokens"]
    return count


def test_a_response_is_continued(client: TestClient) -> None:
    """A continued response has the prompt of all items before it; instructions hold once."""
    first = ask(client, "one", instructions="Be kind.")
    second = ask(client, "two", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    assert second["usage"]["input_tokens"] == in_full(client, "one", "one", "two")
    third = ask(client, "three", previous_response_id=second["id"], instructions="Be brief.")
    assert third["usage"]["input_tokens"] == in_full(
        client, "one", "one", "two", "two", "three", instructions="Be brief."
    )


def test_a_streamed_response_is_continued(client: TestClient) -> None:
    """A streamed response is kept before its last event is told."""
    streamed = response_events(respond(client, "one", stream=True))[-1]["response"]
    assert client.get(f"/v1/responses/{streamed['id']}").json() == streamed
    second = ask(client, "two", previous_response_id=streamed["id"])
    assert second["usage"]["input_tokens"] == in_full(client, "one", "one", "two")


def test_branches_do_not_meet(client: TestClient) -> None:
    """A response is continued several times, and each branch has its own messages alone."""
    first = ask(client, "one")
    left = ask(client, "left", previous_response_id=first["id"])
    right = ask(client, "to the right", previous_response_id=first["id"])
    for branch, text in ((left, "left"), (right, "to the right")):
        last = ask(client, "end", previous_response_id=branch["id"])
        assert last["usage"]["input_tokens"] == in_full(client, "one", "one", text, text, "end")


def test_system_messages_of_the_input_stay(client: TestClient) -> None:
    """The input's own system messages are kept, each in its place."""
    first = ask(client, [message("developer", "A"), message("user", "one")])
    given = [message("developer", "B"), message("user", "two")]
    second = ask(client, given, previous_response_id=first["id"])
    items = [message("developer", "A"), message("user", "one"), message("assistant", "one"), *given]
    assert second["usage"]["input_tokens"] == ask(client, items)["usage"]["input_tokens"]


def test_a_call_is_continued_by_its_result(client: TestClient) -> None:
    """The result of a call alone continues a response, as all items do."""
    first = ask(client, CALL, tools=[NOW])
    (call,) = first["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "noon"}
    second = ask(client, [result], previous_response_id=first["id"])
    full = ask(client, [message("user", CALL), call, result])
    assert second["usage"]["input_tokens"] == full["usage"]["input_tokens"]


def test_items_are_referred_to(client: TestClient) -> None:
    """A reference stands for the item that a kept response has, with or without its type."""
    first = ask(client, f"Look: {CALL}", tools=[NOW])
    text, call = first["output"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "noon"}
    counts = [
        ask(client, [message("user", "one"), *said, result])["usage"]["input_tokens"]
        for said in (
            [text, call],
            [{"type": "item_reference", "id": text["id"]}, call],
            [{"id": text["id"]}, {"id": call["id"]}],
        )
    ]
    assert len(set(counts)) == 1
    for unknown in (f"{text['id']}9", "msg_x", f"msg_{'0' * 32}_0"):
        fault = respond(client, [message("user", "one"), {"id": unknown}])
        assert refused(fault) == (404, NOT_FOUND, "input.1.id")


def test_a_conversation_is_kept(client: TestClient) -> None:
    """A conversation grows by each response, and the native routes show it."""
    first = ask(client, "one", conversation="talk-of-responses")
    assert first["conversation"] == {"id": "talk-of-responses"}
    second = ask(client, "two", conversation={"id": "talk-of-responses"}, store=False)
    assert second["usage"]["input_tokens"] == in_full(client, "one", "one", "two")
    history = client.get("/v1/sessions/talk-of-responses").json()["messages"]
    assert [m["content"] for m in history] == ["one", "one", "two", "two"]
    branch = ask(client, "other", previous_response_id=first["id"])
    assert branch["usage"]["input_tokens"] == in_full(client, "one", "one", "other")


def test_a_response_is_read_and_deleted(client: TestClient) -> None:
    """A kept response is read as it was answered; once deleted, what continues it stays."""
    first = ask(client, "one")
    path = f"/v1/responses/{first['id']}"
    assert client.get(path).json() == first
    second = ask(client, "two", previous_response_id=first["id"])
    deleted = {"id": first["id"], "object": "response", "deleted": True}
    assert client.delete(path).json() == deleted
    for again in (client.get(path), client.delete(path)):
        assert refused(again) == (404, NOT_FOUND, None)
    gone = respond(client, "x", previous_response_id=first["id"])
    assert refused(gone) == (404, NOT_FOUND, "previous_response_id")
    assert ask(client, "three", previous_response_id=second["id"])


def test_responses_belong_to_a_key(client: TestClient) -> None:
    """Another key does not find a response, nor its items."""
    first = ask(client, "one")
    other = {"X-API-Key": OTHER_KEY}
    path = f"/v1/responses/{first['id']}"
    assert client.get(path, headers=other).status_code == 404
    assert client.delete(path, headers=other).status_code == 404
    reference = [{"id": first["output"][0]["id"]}]
    for fault in (
        respond(client, "two", previous_response_id=first["id"], headers=other),
        respond(client, reference, headers=other),
    ):
        assert refused(fault)[:2] == (404, NOT_FOUND)
    assert client.get(path).status_code == 200


def test_store(client: TestClient) -> None:
    """With store false, and after a fault, nothing is kept."""
    response = ask(client, "one", store=False)
    assert response["store"] is False
    assert client.get(f"/v1/responses/{response['id']}").status_code == 404
    events = response_events(respond(client, "[echo:fault]", stream=True))
    assert client.get(f"/v1/responses/{events[-1]['response']['id']}").status_code == 404


def test_no_session_is_a_response(client: TestClient) -> None:
    """The names of sessions and the ids of responses do not meet."""
    first = ask(client, "one")
    for path in (f"/v1/sessions/{first['id']}", f"/v1/sessions/%2F{first['id']}"):
        assert client.get(path).status_code == 404
    ask(client, "mine", conversation="resp_mine")
    assert client.get("/v1/responses/resp_mine").status_code == 404
    ask(client, "two", conversation=first["id"])
    assert client.get(f"/v1/responses/{first['id']}").json() == first


def test_truncation(run_app: RunApp) -> None:
    """A history beyond the context is refused by default, and loses its oldest turns with auto."""
    client = run_app(security={"max_prompt_chars": 10_000})
    first = ask(client, "a" * 1500)
    for letter in "bcd":
        first = ask(client, letter * 1500, previous_response_id=first["id"])
    fields = {"previous_response_id": first["id"], "max_output_tokens": 100}
    assert refused(respond(client, "x", **fields))[:2] == (400, "context_length_exceeded")
    fitting = ask(client, "x", truncation="auto", **fields)
    assert fitting["usage"]["dropped_messages"] == 2
    assert fitting["truncation"] == "auto"


def test_the_bounds_of_kept_responses(run_app: RunApp) -> None:
    """chat_history.max_messages cuts no response short; past max_sessions the oldest are gone."""
    client = run_app(chat_history={"max_sessions": 3, "max_messages": 2})
    answers = [ask(client, "one")]
    for text in ("two", "three", "four"):
        answers.append(ask(client, text, previous_response_id=answers[-1]["id"]))
    said = ("one", "one", "two", "two", "three", "three", "four")
    assert answers[-1]["usage"]["input_tokens"] == in_full(client, *said)
    found = [client.get(f"/v1/responses/{answer['id']}").status_code for answer in answers]
    assert found == [404, 200, 200, 200]


def test_without_conversations_nothing_is_kept(run_app: RunApp) -> None:
    """With chat_history.enabled false a response is answered, not kept, and not continued."""
    client = run_app(chat_history={"enabled": False})
    response = ask(client, "one")
    assert response["store"] is False
    assert client.get(f"/v1/responses/{response['id']}").status_code == 404
    asked = {"store": True, "conversation": "a", "previous_response_id": "resp_x"}
    for field, value in asked.items():
        fault = refused(respond(client, "two", **{field: value}))
        assert fault == (400, "unsupported_parameter", field)
