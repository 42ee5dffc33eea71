"""Requests to the servers that can be measured, and the reading of their streams."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

from benchmarks.load.workload import PlannedRequest

_DONE = b"[DONE]"
_encode = msgspec.json.Encoder().encode


class Route(StrEnum):
    """The routes that can be measured."""

    CHAT = "chat"
    GENERATE = "generate"
    OPENAI_CHAT = "openai-chat"
    OPENAI_COMPLETIONS = "openai-completions"

    @property
    def is_native(self) -> bool:
        """Whether it is a native route of this service."""
        return self in (Route.CHAT, Route.GENERATE)


_PATHS = {
    Route.CHAT: "/v1/chat",
    Route.GENERATE: "/v1/generate",
    Route.OPENAI_CHAT: "/v1/chat/completions",
    Route.OPENAI_COMPLETIONS: "/v1/completions",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A server and one of its routes.

    Attributes:
        base_url: Without ``/v1``.
        key: Sent as ``X-API-Key`` to native routes and as a bearer token to others.
        model: The model's name on OpenAI's routes.
        system: System message of chats.
        extra: Further members of the body.
    """

    base_url: str
    route: Route
    key: str = field(default="", repr=False)
    model: str = "default"
    system: str | None = None
    temperature: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The route's path."""
        return _PATHS[self.route]

    @property
    def headers(self) -> dict[str, str]:
        """The header with the API key."""
        if not self.key:
            return {}
        if self.route.is_native:
            return {"X-API-Key": self.key}
        return {"Authorization": f"Bearer {self.key}"}

    def body(self, request: PlannedRequest) -> bytes:
        """The body of a streamed request that no response cache answers."""
        fields: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            "temperature": self.temperature,
            "stream": True,
        }
        if self.route in (Route.CHAT, Route.OPENAI_CHAT):
            system = [{"role": "system", "content": self.system}] if self.system else []
            fields["messages"] = [*system, {"role": "user", "content": request.prompt}]
        else:
            fields["prompt"] = request.prompt
        if self.route.is_native:
            fields["cache"] = False
        else:
            fields["model"] = self.model
            fields["stream_options"] = {"include_usage": True}
        return _encode(fields | self.extra)


class _Delta(msgspec.Struct):
    content: str | None = None
    text: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int | None = None
    prompt_tokens: int | None = None


class _Event(_Choice):
    """An event of either shape: OpenAI's has in ``choices`` what a native one has at the top."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    tokens_generated: int | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True)
class Stream:
    """The content of a stream of server-sent events, as the server reports it.

    Attributes:
        text_at: Arrival time of each piece of text.
        done: Whether ``[DONE]`` arrived.
    """

    text: str = ""
    text_at: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    done: bool = False
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    error: str | None = None


def read_stream(pieces: list[tuple[float, bytes]]) -> Stream:
    """Read the pieces of a body; an event has the arrival time of its last piece."""
    stream = Stream()
    texts: list[str] = []
    rest = b""
    for at, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == _DONE:
                stream.done = True
            elif text := _read_event(data, stream):
                texts.append(text)
                stream.text_at.append(at)
    stream.text = "".join(texts)
    return stream


def _read_event(data: bytes, stream: Stream) -> str:
    """Store the event's other members in ``stream`` and return its text."""
    try:
        event = _decode(data)
    except msgspec.DecodeError:
        stream.error = "an event is not the JSON object that it should be"
        return ""
    if event.error:
        stream.error = error_text({"error": event.error})
        return ""
    part = event.choices[0] if event.choices else event
    stream.finish_reason = part.finish_reason or stream.finish_reason
    _read_usage(event, stream)
    delta = part.delta or _Delta()
    return delta.content or delta.text or part.text or ""


def _read_usage(event: _Event, stream: Stream) -> None:
    usage = event.usage or _Usage()
    for count in (event.tokens_generated, usage.completion_tokens):
        if count is not None:
            stream.completion_tokens = count
            break
    if usage.prompt_tokens is not None:
        stream.prompt_tokens = usage.prompt_tokens


def error_text(body: Any) -> str:
    """The code, message or type of an error in OpenAI's shape, at most 200 characters."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("code") or error.get("message") or error.get("type") or "an error"
    return str(error)[:200]
