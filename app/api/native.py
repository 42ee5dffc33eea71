"""How /v1/generate and /v1/chat write their answers; docs/api.md shows them.

The text comes first in an answer and in each event, then the model, then what clients read seldom.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from app.api.respond import Event, Shape, usage
from app.api.schemas import AssistantMessage, ChatResponse, GenerateResponse
from app.llm.tool_calls import Piece, ReasoningPiece
from app.services.answers import Answer


class NativeShape(Shape):
    """What both native routes share: one answer, whose events have a ``delta``."""

    @abstractmethod
    def delta(self, piece: Piece) -> dict[str, Any]:
        """The member of an event that holds a piece of text."""

    def first(self, answers: Sequence[Answer]) -> Iterable[Event]:
        """Tell the id, the model and who speaks."""
        (answer,) = answers
        yield {"delta": {"role": "assistant"}, "model": answer.model, "id": answer.id}

    def piece(self, answer: Answer, piece: Piece) -> Iterable[Event]:
        """Bring a piece of text."""
        return ({"delta": self.delta(piece), "id": answer.id},)

    def last(self, answer: Answer) -> Iterable[Event]:
        """Tell how the answer ended and what it took."""
        return ({"delta": {}, **answer_fields(answer)},)


class GenerateShape(NativeShape):
    """Answers of POST /v1/generate, with the prompt as it was sent."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt

    def whole(
        self,
        answers: Sequence[Answer],
        pieces: Sequence[Sequence[Piece]],  # noqa: ARG002 - text alone
    ) -> GenerateResponse:
        """The text, the prompt and what is told beside them."""
        (answer,) = answers
        return GenerateResponse(
            generated_text=answer.text, prompt=self._prompt, **answer_fields(answer)
        )

    def delta(self, piece: Piece) -> dict[str, Any]:
        """A piece of text."""
        return {"text": piece}


class ChatShape(NativeShape):
    """Answers of POST /v1/chat, with the session's name where there is one."""

    def __init__(self, session_id: str | None) -> None:
        self._session = {"session_id": session_id} if session_id else {}

    def whole(
        self,
        answers: Sequence[Answer],
        pieces: Sequence[Sequence[Piece]],  # noqa: ARG002 - text alone
    ) -> ChatResponse:
        """The message and what is told beside it."""
        (answer,) = answers
        message = AssistantMessage(role="assistant", content=answer.text)
        if answer.reasoning:
            message.reasoning = answer.reasoning
        return ChatResponse(message=message, **self._session, **answer_fields(answer))

    def delta(self, piece: Piece) -> dict[str, Any]:
        """A piece of the message, or of the reasoning."""
        if isinstance(piece, ReasoningPiece):
            return {"reasoning": piece.text}
        return {"content": piece}


def answer_fields(answer: Answer) -> dict[str, Any]:
    """What every complete answer tells beside its text."""
    report = answer.report
    return {
        "model": answer.model,
        "tokens_generated": report.completion_tokens,
        "cached": answer.cached,
        "id": answer.id,
        "finish_reason": report.finish_reason,
        "usage": usage([answer]),
    }
