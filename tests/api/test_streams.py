"""A stream is the unstreamed answer in pieces, on every route and at every length."""

import os
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support.openai import chunks, user
from tests.support.sse import piece_of

# Emoji, joined emoji, a combining accent, a flag of two code points, CJK. Each byte is a token.
TEXT = "a😀👩‍👩‍👧e\u0301🇫🇷漢字नि!"

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/generate": {"prompt": TEXT},
    "/v1/chat": {"messages": user(TEXT)},
    "/v1/chat/completions": {"model": "echo", "messages": user(TEXT)},
    "/v1/completions": {"model": "echo", "prompt": TEXT},
}


def whole(client: TestClient, path: str, body: dict[str, Any]) -> str:
    """The unstreamed answer's text."""
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    if "choices" in answer:
        (answer,) = answer["choices"]
    answer = answer.get("message", answer)
    (text,) = [answer[name] for name in ("content", "text", "generated_text") if name in answer]
    return text or ""


def streamed(client: TestClient, path: str, body: dict[str, Any]) -> list[str]:
    """The stream's pieces."""
    events = chunks(client.post(path, json={**body, "stream": True}))
    if "model" not in body:
        return [piece_of(event) or "" for event in events]
    choices = [choice for event in events for choice in event["choices"]]
    return [c.get("text") or c.get("delta", {}).get("content") or "" for c in choices]


@pytest.mark.parametrize("path", ROUTES)
def test_the_pieces_are_the_answer_wherever_it_is_cut(client: TestClient, path: str) -> None:
    """For each number of tokens, stream and answer are the same text of whole characters."""
    asked = {**ROUTES[path], "cache": False}
    # Each number is one route's in turn; `make test-full` tries each on all.
    turn, routes = (0, 1) if "FULL_SIZE" in os.environ else ([*ROUTES].index(path), len(ROUTES))
    for max_tokens in range(1 + turn, len(TEXT.encode()), routes):
        body = {**asked, "max_tokens": max_tokens}
        text = whole(client, path, body)
        assert "".join(streamed(client, path, body)) == text
        assert "\ufffd" not in text
        assert TEXT.startswith(text)
        # Only an incomplete character is held back.
        assert len(text.encode()) > max_tokens - 4
    assert whole(client, path, asked) == TEXT
    assert [piece for piece in streamed(client, path, asked) if piece] == list(TEXT)
