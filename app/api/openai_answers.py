"""Answers of the OpenAI routes: whole, and as chunks of a stream.

The shapes are those of OpenAI's API reference. Beside them, ``cached`` tells whether an answer came
from the response cache.
"""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from app.api.schemas import usage
from app.api.sse import frame
from app.llm.engine.base import EngineInfo
from app.llm.generator import TokenLogprob
from app.llm.tool_calls import CallPiece, Piece
from app.services.answers import Answer
from app.services.choices import Choices


class AnswerShape(ABC):
    """How one response is written; made anew for each."""

    name: str
    chunk_name: str

    def __init__(
        self, info: EngineInfo | None, *, n: int, logprobs: bool, include_usage: bool
    ) -> None:
        """Begin a response.

        Args:
            info: What is served.
            n: Choices for each prompt.
            logprobs: Whether log-probabilities were asked for.
            include_usage: Whether a stream tells the usage.
        """
        self._n = n
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._fingerprint = fingerprint(info)

    @abstractmethod
    def _delta(self, piece: Piece) -> dict[str, Any]:
        """A chunk's choice: what a piece of the answer adds."""

    @abstractmethod
    def _begin(self) -> dict[str, Any] | None:
        """The choice of the chunk that begins each answer, if there is one."""

    @abstractmethod
    def _last(self) -> dict[str, Any]:
        """The choice of the chunk that ends each answer, without its reason."""

    @abstractmethod
    def _whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A complete answer's choice."""

    @abstractmethod
    def _write_logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Log-probabilities of a part of an answer."""

    async def stream(self, choices: Choices) -> AsyncIterator[bytes]:
        """The events of a streamed response."""
        head = self._head(choices, self.chunk_name)
        if self._include_usage:
            head["usage"] = None
        answers = choices.answers
        if (begin := self._begin()) is not None:
            for index in range(len(answers)):
                yield frame(head | {"choices": [self._choice(index, begin, None)]})
        async for index, piece in choices:
            answer = answers[index]
            if piece is None:
                choice = self._choice(index, self._last(), answer, finish_reason(answer))
                yield frame(head | {"choices": [choice], "cached": answer.cached})
            else:
                yield frame(head | {"choices": [self._choice(index, self._delta(piece), answer)]})
        if self._include_usage:
            yield frame(head | {"choices": [], "usage": self._usage(answers)})

    async def whole(self, choices: Choices) -> dict[str, Any]:
        """A response that is not streamed, once it is complete.

        Raises:
            ServiceError: An answer broke off.
        """
        try:
            pieces: list[list[Piece]] = [[] for _ in choices.answers]
            async for index, piece in choices:
                if piece is not None:
                    pieces[index].append(piece)
            return self._head(choices, self.name) | {
                "choices": [
                    self._choice(i, self._whole(pieces[i]), answer, finish_reason(answer))
                    for i, answer in enumerate(choices.answers)
                ],
                "usage": self._usage(choices.answers),
                "cached": all(answer.cached for answer in choices.answers),
            }
        finally:
            await choices.aclose()

    def _head(self, choices: Choices, name: str) -> dict[str, Any]:
        first = choices.answers[0]
        return {
            "id": first.id,
            "object": name,
            "created": int(time.time()),
            "model": first.model,
            "system_fingerprint": self._fingerprint,
        }

    def _choice(
        self, index: int, content: dict[str, Any], answer: Answer | None, reason: str | None = None
    ) -> dict[str, Any]:
        logprobs = answer.take_logprobs() if answer is not None and self._logprobs else []
        return {
            "index": index,
            **content,
            "logprobs": self._write_logprobs(logprobs) if logprobs else None,
            "finish_reason": reason,
        }

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Tokens of all choices; those that share a prompt count it once."""
        firsts = answers[:: self._n]
        total = usage(answers[0].completion).model_dump(exclude_none=True)
        prompt = sum(a.completion.prompt_tokens for a in firsts)
        completion = sum(a.completion.completion_tokens for a in answers)
        cached = sum(a.completion.cached_tokens for a in firsts)
        return total | {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class ChatShape(AnswerShape):
    """Chat completions."""

    name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def _begin(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def _last(self) -> dict[str, Any]:
        return {"delta": {}}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, str):
            return {"delta": {"content": piece}}
        function: dict[str, Any] = {"arguments": piece.arguments}
        call: dict[str, Any] = {"index": piece.index, "function": function}
        if piece.name is not None:
            call |= {"id": piece.id, "type": "function"}
            function["name"] = piece.name
        return {"delta": {"tool_calls": [call]}}

    def _whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(p for p in pieces if isinstance(p, str))
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            if not isinstance(piece, CallPiece):
                continue
            if piece.name is not None:
                function = {"name": piece.name, "arguments": ""}
                calls.append({"id": piece.id, "type": "function", "function": function})
            calls[piece.index]["function"]["arguments"] += piece.arguments
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": calls}
        return {"message": message}

    def _write_logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **_token(entry.token, entry.logprob),
                    "top_logprobs": [_token(token, logprob) for token, logprob in entry.top],
                }
                for entry in logprobs
            ],
            "refusal": None,
        }


class CompletionShape(AnswerShape):
    """Completions; their chunks look like the whole."""

    name = chunk_name = "text_completion"

    def _begin(self) -> None:
        return None

    def _last(self) -> dict[str, Any]:
        return {"text": ""}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        return {"text": piece}

    def _whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {"text": "".join(p for p in pieces if isinstance(p, str))}

    def _write_logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [_text(entry.token) for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [
                {_text(token): logprob for token, logprob in entry.top} for entry in logprobs
            ],
            "text_offset": [entry.start for entry in logprobs],
        }


def finish_reason(answer: Answer) -> str:
    """Why an answer ended, in OpenAI's words."""
    reason = answer.completion.finish_reason
    return "tool_calls" if reason == "stop" and answer.calls else reason


def fingerprint(info: EngineInfo | None) -> str | None:
    """Changes whenever the same seed may give another answer."""
    if info is None:
        return None
    parts = json.dumps([info.model, info.revision, info.backend, info.device, info.dtype])
    return "fp_" + hashlib.sha256(parts.encode()).hexdigest()[:10]


def _token(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(token), "logprob": logprob, "bytes": list(token)}


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")


def numbered_seeds(seed: int | None, n: int) -> Iterator[int | None]:
    """A seed for each choice, so that they differ and yet can be repeated."""
    for index in range(n):
        yield None if seed is None else (seed + index + 2**63) % 2**64 - 2**63
