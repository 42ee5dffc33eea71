"""Talking to the OpenAI routes of an application in this process."""

import json
from typing import Any

from starlette.testclient import TestClient

from tests.support.sse import data_lines

Response = Any
"""What the test client returns; Starlette chooses its library by what is installed."""

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES = "/v1/responses"

# Fields for OpenAI's own platform, without effect here, with values of its clients.
PLATFORM_HINTS: dict[str, Any] = {
    "metadata": {"trace": "a1"},
    "prompt_cache_key": "tenant-7",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "user-7",
    "service_tier": "flex",
}


def user(text: str) -> list[dict[str, Any]]:
    """A chat of one message."""
    return [{"role": "user", "content": text}]


def chat(client: TestClient, text: Any = "hello", **fields: Any) -> Response:
    """One request; fields replace the defaults."""
    headers = fields.pop("headers", {})
    body = {"model": "echo", "messages": user(text), "cache": False, **fields}
    return client.post(CHAT, json=body, headers=headers)


def complete(client: TestClient, prompt: Any = "hello", **fields: Any) -> Response:
    """One request; fields replace the defaults."""
    return client.post(
        COMPLETIONS, json={"model": "echo", "prompt": prompt, "cache": False, **fields}
    )


def respond(client: TestClient, given: Any = "hello", **fields: Any) -> Response:
    """One request for a response; fields replace the defaults."""
    headers = fields.pop("headers", {})
    body = {"model": "echo", "input": given, "cache": False, **fields}
    return client.post(RESPONSES, json=body, headers=headers)


def response_events(response: Response) -> list[dict[str, Any]]:
    """The events of a streamed response, whose lines name them and whose numbers follow."""
    assert response.status_code == 200, response.text
    *frames, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    events: list[dict[str, Any]] = []
    for number, lines in enumerate(frames):
        name, data = lines.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        assert events[-1]["sequence_number"] == number
    return events


def chunks(response: Response) -> list[dict[str, Any]]:
    """The chunks of a stream that ended in order."""
    assert response.status_code == 200, response.text
    *lines, done = data_lines(response.text.splitlines())
    assert done == "[DONE]"
    return [json.loads(line) for line in lines]


def texts(found: list[dict[str, Any]]) -> dict[int, str]:
    """The text of each choice of a stream."""
    joined: dict[int, str] = {}
    for chunk in found:
        for choice in chunk["choices"]:
            delta = choice.get("delta", choice)
            piece = delta.get("content", delta.get("text")) or ""
            joined[choice["index"]] = joined.get(choice["index"], "") + piece
    return joined


def refused(response: Response) -> tuple[int, str, str | None]:
    """Status, code and param of an error in the one shape."""
    error = response.json()["error"]
    assert error.keys() >= {"message", "type", "param", "code", "request_id"}
    return response.status_code, error["code"], error["param"]
