"""How the OpenAI routes write their answers: whole, and as chunks of a stream."""

import hashlib
import json
import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from app.api.openai.answers import ChatCompletion, Completion, OpenAIAnswer
from app.api.respond import Event, Shape, usage
from app.llm.protocol import EngineInfo
from app.llm.report import TokenLogprob
from app.llm.tool_calls import CallPiece, Piece, ReasoningPiece
from app.services.answers import Answer


class OpenAIShape(Shape):
    """What chat completions and completions share.

    Args:
        info: What is served.
        n: Choices for each prompt.
        logprobs: Whether log-probabilities were asked for.
        include_usage: Whether a stream tells the usage.

    Attributes:
        begin: Content of the chunk that begins each answer, if there is one.
        ending: Content of the chunk that ends each answer.
    """

    model: type[OpenAIAnswer]
    name: str
    chunk_name: str
    begin: ClassVar[Event | None]
    ending: ClassVar[Event]

    def __init__(
        self, info: EngineInfo | None, *, n: int, logprobs: bool, include_usage: bool
    ) -> None:
        self._n = n
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._fingerprint = fingerprint(info)
        self._head: Event = {}

    @abstractmethod
    def delta(self, piece: Piece) -> Event:
        """The content of a chunk: what a piece adds."""

    @abstractmethod
    def content(self, pieces: Sequence[Piece]) -> Event:
        """The content of a whole answer."""

    @abstractmethod
    def logprobs(self, logprobs: Sequence[TokenLogprob]) -> Event:
        """Log-probabilities of a part of an answer."""

    def whole(self, answers: Sequence[Answer], pieces: Sequence[Sequence[Piece]]) -> OpenAIAnswer:
        """All choices."""
        return self.model(
            **self._make_head(answers[0], self.name),
            choices=[
                self._choice(answer, self.content(said), finish_reason(answer))
                for answer, said in zip(answers, pieces, strict=True)
            ],
            usage=usage(answers, self._n),
            cached=all(answer.cached for answer in answers),
        )

    def first(self, answers: Sequence[Answer]) -> Iterable[Event]:
        """A chunk for each answer that says who speaks."""
        self._head = self._make_head(answers[0], self.chunk_name)
        if self._include_usage:
            self._head["usage"] = None
        if self.begin is not None:
            for answer in answers:
                yield self._chunk(answer, self.begin)

    def piece(self, answer: Answer, piece: Piece) -> Iterable[Event]:
        """A chunk with a piece of an answer."""
        return (self._chunk(answer, self.delta(piece)),)

    def last(self, answer: Answer) -> Iterable[Event]:
        """The chunk with an answer's finish reason."""
        chunk = self._chunk(answer, self.ending, finish_reason(answer))
        return (chunk | {"cached": answer.cached},)

    def end(self, answers: Sequence[Answer]) -> Iterable[Event]:
        """A chunk with the usage, where that was asked for."""
        if self._include_usage:
            yield self._head | {"choices": [], "usage": usage(answers, self._n)}

    def _make_head(self, first: Answer, name: str) -> Event:
        return {
            "id": first.id,
            "object": name,
            "created": int(time.time()),
            "model": first.model,
            "system_fingerprint": self._fingerprint,
        }

    def _chunk(self, answer: Answer, content: Event, reason: str | None = None) -> Event:
        return self._head | {"choices": [self._choice(answer, content, reason)]}

    def _choice(self, answer: Answer, content: Event, reason: str | None) -> Event:
        logprobs = answer.take_logprobs() if self._logprobs else []
        return {
            "index": answer.index,
            **content,
            "logprobs": self.logprobs(logprobs) if logprobs else None,
            "finish_reason": reason,
        }


class ChatCompletionShape(OpenAIShape):
    """Chat completions."""

    model = ChatCompletion
    name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    begin: ClassVar = {"delta": {"role": "assistant", "content": ""}}
    ending: ClassVar = {"delta": {}}

    def __init__(self, *args: Any, reasoning_names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reasoning_names = reasoning_names

    def delta(self, piece: Piece) -> Event:
        """Text, or a part of a call."""
        if isinstance(piece, str):
            return {"delta": {"content": piece}}
        if isinstance(piece, ReasoningPiece):
            return {"delta": dict.fromkeys(self._reasoning_names, piece.text)}
        function: Event = {"arguments": piece.arguments}
        call: Event = {"index": piece.index, "function": function}
        if piece.name is not None:
            call |= {"id": piece.id, "type": "function"}
            function["name"] = piece.name
        return {"delta": {"tool_calls": [call]}}

    def content(self, pieces: Sequence[Piece]) -> Event:
        """The message, with its calls."""
        text = "".join(p for p in pieces if isinstance(p, str))
        calls: list[Event] = []
        for piece in pieces:
            if not isinstance(piece, CallPiece):
                continue
            if piece.name is not None:
                function = {"name": piece.name, "arguments": ""}
                calls.append({"id": piece.id, "type": "function", "function": function})
            calls[piece.index]["function"]["arguments"] += piece.arguments
        message: Event = {"role": "assistant", "content": text, "refusal": None}
        if reasoning := "".join(p.text for p in pieces if isinstance(p, ReasoningPiece)):
            message |= dict.fromkeys(self._reasoning_names, reasoning)
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {"message": message}

    def logprobs(self, logprobs: Sequence[TokenLogprob]) -> Event:
        """Each token with the likeliest of its place."""
        return {"content": chat_logprobs(logprobs), "refusal": None}


class CompletionShape(OpenAIShape):
    """Completions; their chunks look like the whole."""

    model = Completion
    name = chunk_name = "text_completion"
    begin: ClassVar = None
    ending: ClassVar = {"text": ""}

    def delta(self, piece: Piece) -> Event:
        """Text."""
        return {"text": piece}

    def content(self, pieces: Sequence[Piece]) -> Event:
        """The whole text."""
        return {"text": "".join(p for p in pieces if isinstance(p, str))}

    def logprobs(self, logprobs: Sequence[TokenLogprob]) -> Event:
        """A list for each kind of figure."""
        return {
            "tokens": [_text(entry.token) for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [
                {_text(token): logprob for token, logprob in entry.top} for entry in logprobs
            ],
            "text_offset": [entry.start for entry in logprobs],
        }


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> list[Event]:
    """Each token with the likeliest of its place."""
    return [
        {
            **_token(entry.token, entry.logprob),
            "top_logprobs": [_token(token, logprob) for token, logprob in entry.top],
        }
        for entry in logprobs
    ]


def finish_reason(answer: Answer) -> str:
    """Why an answer ended, in OpenAI's words."""
    reason = answer.report.finish_reason
    return "tool_calls" if reason == "stop" and answer.calls else reason


def fingerprint(info: EngineInfo | None) -> str:
    """Changes whenever the same seed may give another answer."""
    parts = [info.model, info.revision, info.backend, info.device, info.dtype] if info else []
    return "fp_" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]


def _token(token: bytes, logprob: float) -> Event:
    return {"token": _text(token), "logprob": logprob, "bytes": list(token)}


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")
