"""Reading server-sent events the way a client of this service does."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

DONE = "[DONE]"


@dataclass(frozen=True)
class Streamed:
    """A stream that was read to its end.

    Attributes:
        events: What the ``data:`` lines carried, without the final ``[DONE]``.
        done: Whether ``[DONE]`` came, and came last.
        headers: The response's.
    """

    events: list[dict[str, Any]]
    done: bool
    headers: httpx.Headers

    @property
    def pieces(self) -> list[str]:
        """The answer's text as it came."""
        return [piece for event in self.events if (piece := piece_of(event)) is not None]

    @property
    def text(self) -> str:
        """The pieces joined."""
        return "".join(self.pieces)

    @property
    def last(self) -> dict[str, Any]:
        """The event before ``[DONE]``."""
        return self.events[-1]

    @property
    def error(self) -> dict[str, Any] | None:
        """The error the stream ended with, if it did."""
        error: dict[str, Any] | None = self.last.get("error") if self.events else None
        return error


def piece_of(event: dict[str, Any]) -> str | None:
    """The text an event carries, if it carries any."""
    delta = event.get("delta", {})
    text: str | None = delta.get("content", delta.get("text"))
    return text


def data_lines(lines: Iterable[str]) -> Iterator[str]:
    """The values of ``data:`` lines; comments and blank lines are skipped, others fail."""
    for line in lines:
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            assert name == "data", f"an unexpected line in a stream: {line!r}"
            yield value


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The events of an open stream as they come, up to ``[DONE]``."""
    for data in data_lines(response.iter_lines()):
        if data == DONE:
            return
        yield json.loads(data)


def parse(body: str, headers: httpx.Headers) -> Streamed:
    """A whole stream's body."""
    data = list(data_lines(body.split("\n")))
    done = bool(data) and data[-1] == DONE
    return Streamed([json.loads(d) for d in (data[:-1] if done else data)], done, headers)


def read_stream(client: httpx.Client, path: str, body: dict[str, Any], **kwargs: Any) -> Streamed:
    """Ask for a stream and read it to its end; a refusal fails the test."""
    response = client.post(path, json={**body, "stream": True}, **kwargs)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return parse(response.text, response.headers)
