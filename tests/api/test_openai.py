"""The OpenAI routes over the echo engine: every field is honoured or refused, never ignored."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.conftest import RunApp, running_app
from tests.support.openai import (
    CHAT,
    COMPLETIONS,
    chat,
    chunks,
    complete,
    refused,
    respond,
    texts,
    user,
)
from tests.support.service import OTHER_KEY


@pytest.fixture(scope="module")
def narrow() -> Iterator[TestClient]:
    """An application that has one place, and a model with aliases."""
    aliases = {"aliases": ["gpt-4o-mini", "org/model"]}
    with running_app(model=aliases, engine={"max_running": 1, "max_waiting": 0}) as client:
        yield client


# --- shapes -------------------------------------------------------------------------------------


def test_chat_has_openais_shape(client: TestClient) -> None:
    """A whole chat completion has the members of OpenAI's."""
    answer = chat(client).json()
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert isinstance(answer["created"], int)
    assert answer["system_fingerprint"].startswith("fp_")
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "hello", "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    usage = answer["usage"]
    assert usage["completion_tokens"] == len("hello") + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_completion_has_openais_shape(client: TestClient) -> None:
    """A whole completion has the members of OpenAI's."""
    answer = complete(client).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}
    ]


def test_stream(client: TestClient) -> None:
    """A stream begins with the role, ends with the reason, and joins to the whole text."""
    found = chunks(chat(client, "Grüße, 世界!", stream=True))
    assert {c["object"] for c in found} == {"chat.completion.chunk"}
    assert len({c["id"] for c in found}) == 1
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert found[-1]["choices"][0]["delta"] == {}
    reasons = [c["choices"][0]["finish_reason"] for c in found]
    assert reasons == [None] * (len(found) - 1) + ["stop"]
    assert texts(found) == {0: "Grüße, 世界!"}
    assert all("usage" not in c for c in found)


def test_a_streamed_completion(client: TestClient) -> None:
    """The chunks of a streamed completion have the shape of a whole one, and join to its text."""
    found = chunks(complete(client, stream=True))
    assert {c["object"] for c in found} == {"text_completion"}
    assert texts(found) == {0: "hello"}
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


def test_include_usage(client: TestClient) -> None:
    """The usage comes in a last chunk without choices, and is null in those before."""
    found = chunks(chat(client, stream=True, stream_options={"include_usage": True}))
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == chat(client).json()["usage"]
    assert all(c["usage"] is None for c in found[:-1])


def test_a_fault_in_a_stream_is_an_event(client: TestClient) -> None:
    """A fault after the first chunk is an event of the stream, which still ends with [DONE]."""
    found = chunks(chat(client, "[echo:fault]", stream=True))
    assert found[-1]["error"]["code"] == "internal_error"


# --- fields that are honoured -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["echo", "default"])
def test_model_by_name_or_alias(client: TestClient, name: str) -> None:
    """A request may name the model or an alias; the answer has the model's name."""
    assert chat(client, model=name).json()["model"] == "echo"
    assert complete(client, model=name).json()["model"] == "echo"
    assert client.get(f"/v1/models/{name}").json()["id"] == name


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_another_model_is_not_found(client: TestClient, path: str) -> None:
    """A model that is not served here is 404 with OpenAI's code."""
    body = {"model": "gpt-4o", "messages": user("x")} if path == CHAT else {"model": "gpt-4o"}
    body |= {} if path == CHAT else {"prompt": "x"}
    assert refused(client.post(path, json=body)) == (404, "model_not_found", "model")
    assert refused(client.get("/v1/models/gpt-4o")) == (404, "model_not_found", "model")


def test_models_are_listed(narrow: TestClient) -> None:
    """The list has the model and its aliases; a name with a slash has a path, too."""
    listed = narrow.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [m["id"] for m in listed["data"]] == ["echo", "gpt-4o-mini", "org/model"]
    assert {m["object"] for m in listed["data"]} == {"model"}
    assert narrow.get("/v1/models/org/model").json()["id"] == "org/model"
    assert chat(narrow, model="org/model").status_code == 200


def test_content_in_parts(client: TestClient) -> None:
    """Text parts are joined."""
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    answer = chat(client, messages=[{"role": "user", "content": parts}]).json()
    assert answer["choices"][0]["message"]["content"] == "one two"


def test_every_role_is_taken(client: TestClient) -> None:
    """All roles of OpenAI reach the prompt; the first instructions become one message."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "A"},
        {"role": "developer", "content": "B"},
        {"role": "user", "content": "C"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "D", "tool_call_id": "c"},
        {"role": "system", "content": "E"},
        {"role": "user", "content": "F"},
    ]
    tokens = client.post("/v1/tokenize", json={"messages": messages}).json()["tokens"]
    assert chat(client, messages=messages).json()["choices"][0]["message"]["content"] == "F"
    fewer = client.post("/v1/tokenize", json={"messages": messages[1:]}).json()["count"]
    assert len(tokens) - fewer == len("A\n\n")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_max_tokens(client: TestClient, field: str) -> None:
    """Either field limits the answer, with the reason length; two different values are 400."""
    choice = chat(client, **{field: 3}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("hel", "length")
    assert chat(client, max_tokens=3, max_completion_tokens=3).status_code == 200
    both = chat(client, max_tokens=3, max_completion_tokens=4)
    assert refused(both)[:2] == (400, "validation_error")


def test_stop(client: TestClient) -> None:
    """A stop string ends the answer before it."""
    for stop in ("l", ["x", "l"]):
        choice = chat(client, stop=stop).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("he", "stop")


def test_n_gives_choices(client: TestClient) -> None:
    """All n choices come, whole and streamed; their prompt is counted once."""
    answer = chat(client, n=3).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert {c["message"]["content"] for c in answer["choices"]} == {"hello"}
    one = chat(client).json()["usage"]
    assert answer["usage"]["prompt_tokens"] == one["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 3 * one["completion_tokens"]
    found = chunks(chat(client, n=3, stream=True, stream_options={"include_usage": True}))
    assert texts(found) == dict.fromkeys(range(3), "hello")
    assert found[-1]["usage"] == answer["usage"]


def test_n_takes_places(narrow: TestClient) -> None:
    """A request whose choices do not all find a place is 503, and holds no place afterwards."""
    assert refused(chat(narrow, n=3))[:2] == (503, "overloaded")
    assert chat(narrow).status_code == 200


def test_several_prompts(client: TestClient) -> None:
    """Choices come in the order of the prompts, n for each; each prompt is counted once."""
    answer = complete(client, ["one", "three"], n=2).json()
    assert [c["text"] for c in answer["choices"]] == ["one", "one", "three", "three"]
    assert answer["usage"]["prompt_tokens"] == len("one") + len("three")
    assert refused(complete(client, ["x"] * 11, n=3))[0] == 400


def test_a_fault_in_one_choice_ends_the_request(client: TestClient) -> None:
    """A fault in one of several answers is an error for the whole request."""
    assert complete(client, ["fine", "[echo:fault]"]).status_code == 500
    found = chunks(complete(client, ["fine " * 50, "[echo:fault]"], stream=True))
    assert found[-1]["error"]["code"] == "internal_error"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 1.5),
        ("top_p", 0.5),
        ("top_k", 5),
        ("min_p", 0.1),
        ("repetition_penalty", 1.1),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("seed", 7),
        ("logit_bias", {"5": 10}),
    ],
)
def test_sampling_reaches_the_engine(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, field: str, value: Any
) -> None:
    """Each sampling field is in the request that the engine gets."""
    engine = client.app.state.services.engine  # type: ignore[attr-defined]
    sent: list[Any] = []
    admit = engine.admit

    def admitting(*args: Any) -> Any:
        place = admit(*args)
        start = place.start

        def starting(request: Any) -> None:
            sent.append(request.sampling)
            start(request)

        place.start = starting
        return place

    monkeypatch.setattr(engine, "admit", admitting)
    assert chat(client, **{field: value}).status_code == 200
    assert complete(client, **{field: value}).status_code == 200
    assert respond(client, **{field: value}).status_code == 200
    expected = {5: 10.0} if field == "logit_bias" else value
    assert [getattr(s, field) for s in sent] == [expected] * 3


def test_seeds_of_choices_differ(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choices of a request have successive seeds."""
    generation = client.app.state.services.generation  # type: ignore[attr-defined]
    seeds: list[int | None] = []
    opening = generation.open

    async def open_(job: Any) -> Any:
        seeds.append(job.sampling["seed"])
        return await opening(job)

    monkeypatch.setattr(generation, "open", open_)
    chat(client, n=2, seed=2**63 - 1)
    chat(client, n=2)
    assert seeds == [2**63 - 1, -(2**63), None, None]


def test_chat_logprobs(client: TestClient) -> None:
    """Each token of the text has its log-probability and bytes, whole and streamed."""
    whole = chat(client, "aé", logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]
    assert whole["content"][0] == {
        "token": "a",
        "logprob": 0.0,
        "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": 0.0, "bytes": [97]}],
    }
    assert bytes(b for entry in whole["content"] for b in entry["bytes"]).decode() == "aé"
    found = chunks(chat(client, "aé", logprobs=True, top_logprobs=1, stream=True))
    streamed = [
        entry
        for chunk in found
        for entry in (chunk["choices"][0]["logprobs"] or {}).get("content", [])
    ]
    assert streamed == whole["content"]
    assert (
        chat(client, logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        == []
    )
    assert refused(chat(client, top_logprobs=1))[:2] == (400, "validation_error")


def test_completion_logprobs(client: TestClient) -> None:
    """Each of the four lists has an entry for each token of the text."""
    logprobs = complete(client, "abc", logprobs=1, stop="c").json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b"],
        "token_logprobs": [0.0, 0.0],
        "top_logprobs": [{"a": 0.0}, {"b": 0.0}],
        "text_offset": [0, 1],
    }


def test_user_has_kept_answers_alone(client: TestClient) -> None:
    """A cached answer is served to the end user it was generated for only."""
    body = {"text": "for one user", "cache": True}
    first = [chat(client, **body, user=name).json()["cached"] for name in ("a", "a", "b")]
    assert first == [False, True, False]


def test_cache_and_its_bypass(client: TestClient) -> None:
    """The response cache serves these routes too; Cache-Control: no-cache bypasses it."""
    body = {"text": "kept once", "cache": True}
    assert [chat(client, **body).json()["cached"] for _ in range(2)] == [False, True]
    streamed = chunks(chat(client, **body, stream=True))
    assert streamed[-1]["cached"] is True
    assert texts(streamed) == {0: "kept once"}
    fresh = chat(client, **body, headers={"Cache-Control": "no-cache"})
    assert fresh.json()["cached"] is False


def test_several_choices_are_not_cached(client: TestClient) -> None:
    """Several choices are not cached, because they are meant to differ."""
    assert [chat(client, "many", cache=True, n=2).json()["cached"] for _ in range(2)] == [False] * 2


def test_x_session_id_keeps_a_conversation(client: TestClient) -> None:
    """The header gives the chat a session, which the native routes show."""
    session = {"headers": {"X-Session-ID": "openai-session"}}
    chat(client, "one", **session)
    chat(client, "two", stream=True, **session)
    history = client.get("/v1/sessions/openai-session").json()["messages"]
    assert [m["content"] for m in history] == ["one", "one", "two", "two"]
    other = client.get("/v1/sessions/openai-session", headers={"X-API-Key": OTHER_KEY})
    assert other.status_code == 404
    assert refused(chat(client, n=2, **session)) == (400, "unsupported_parameter", "n")
    system = chat(client, messages=[{"role": "system", "content": "x"}], **session)
    assert refused(system) == (400, "unsupported_parameter", "messages")
    bad = chat(client, headers={"X-Session-ID": "not a name"})
    assert refused(bad) == (400, "validation_error", "X-Session-ID")


def test_a_turn_may_replace_the_last_messages(client: TestClient) -> None:
    """X-Session-Replace puts a complete turn in the place of messages, a failed one does not."""

    def turn(text: str, replaced: int, **fields: Any) -> Any:
        headers = {"X-Session-ID": "replaced", "X-Session-Replace": str(replaced)}
        return chat(client, text, headers=headers, **fields)

    def history() -> list[str]:
        messages = client.get("/v1/sessions/replaced").json()["messages"]
        return [message["content"] for message in messages]

    before = turn("one", 0).json()["usage"]["prompt_tokens"]
    turn("two", 0)
    assert turn("three", 2, stream=True).status_code == 200
    assert history() == ["one", "one", "three", "three"]
    assert "error" in turn("[echo:fault]", 4).json()
    assert history() == ["one", "one", "three", "three"]
    answer = turn("six", 9).json()
    assert answer["usage"]["prompt_tokens"] == before
    assert history() == ["six", "six"]
    assert refused(turn("x", -1)) == (400, "validation_error", "X-Session-Replace")


def test_both_routers_share_the_use_case(run_app: RunApp) -> None:
    """PII, limits and metrics are the same as on the native routes.

    Log-probabilities are refused where answers are redacted: they would show the redacted text.
    """
    client = run_app(
        pii={"input": "reject", "output": "redact"},
        rate_limit={"enabled": True, "burst_size": 4},
        security={"max_prompt_chars": 50},
    )
    assert refused(chat(client, "mail jane@example.com"))[:2] == (400, "pii_detected")
    assert refused(complete(client, "x" * 51)) == (400, "prompt_too_long", "prompt")
    assert refused(chat(client, logprobs=True)) == (400, "unsupported_parameter", "logprobs")
    answer = chat(client)
    assert answer.headers["X-RateLimit-Remaining"] == "0"
    assert refused(chat(client))[:2] == (429, "rate_limit_exceeded")
    metrics = client.get("/metrics").text
    assert 'tokens_generated_total{model="echo"} 6.0' in metrics
    assert (
        'http_requests_total{endpoint="/v1/chat/completions",method="POST",status="429"}' in metrics
    )


# --- /v1/tokenize -------------------------------------------------------------------------------


def test_tokenize(client: TestClient) -> None:
    """The tokens are those of the request's usage, with their texts where those are asked for."""
    text = client.post("/v1/tokenize", json={"text": "héllo"}).json()
    assert (text["count"], text["max_tokens"]) == (len(text["tokens"]), 8192)
    assert text["count"] == complete(client, "héllo").json()["usage"]["prompt_tokens"]
    messages = client.post("/v1/tokenize", json={"messages": user("hello")}).json()
    assert messages["count"] == chat(client).json()["usage"]["prompt_tokens"]
    told = client.post("/v1/tokenize", json={"text": "h\u00e9", "return_token_strs": True}).json()
    assert (len(told["tokens"]), told["token_strs"]) == (3, ["h", "\ufffd", "\ufffd"])
    assert "token_strs" not in text
    for body in ({}, {"text": "x", "messages": user("x")}, {"text": ""}):
        assert refused(client.post("/v1/tokenize", json=body))[:2] == (422, "validation_error")
