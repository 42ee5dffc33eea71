"""Tokens are counted as a chat has them, with tools and reasoning."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.conftest import running_app
from tests.support.openai import chat, refused, user
from tests.support.reasoning import teach

SAID = "I muse.</think>It is so."


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """An application whose model reasons."""
    with running_app() as client:
        yield teach(client)


TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reasoning_effort": "none"},
        {"reasoning_effort": "high"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"thinking_token_budget": 0},
        {"thinking_token_budget": 3},
        {"tools": [TOOL]},
        {"tools": [TOOL], "thinking_token_budget": 0},
    ],
)
def test_tokens_are_counted_as_a_chat_has_them(client: TestClient, fields: Any) -> None:
    """/v1/tokenize takes what is in a chat's prompt, and its count is the chat's."""
    counted = client.post("/v1/tokenize", json={"messages": user(SAID), **fields}).json()
    assert counted["count"] == chat(client, SAID, **fields).json()["usage"]["prompt_tokens"]


def test_what_cannot_be_counted(client: TestClient) -> None:
    """/v1/tokenize refuses what a chat would, and beside a bare text what is of chats alone."""
    unknown = {"messages": user("x"), "chat_template_kwargs": {"unknown": 1}}
    answer = client.post("/v1/tokenize", json=unknown)
    assert refused(answer) == (400, "unsupported_parameter", "chat_template_kwargs.unknown")
    for fields in ({"reasoning_effort": "none"}, {"tools": [TOOL]}):
        answer = client.post("/v1/tokenize", json={"text": "x", **fields})
        assert answer.status_code == 422
        assert f"{next(iter(fields))} is for messages" in answer.text
    twice = client.post("/v1/tokenize", json={"messages": user("x"), "tools": [TOOL, TOOL]})
    assert twice.status_code == 422
