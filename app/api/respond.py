"""The one way out: answers become a response, whole or as a stream of events."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from app.api.disconnects import CLIENT_CLOSED_REQUEST, unless_disconnected
from app.api.errors import error_content
from app.api.sse import DONE, EventStream, frame, told_error
from app.llm.tool_calls import Piece
from app.services.answers import Answer
from app.services.choices import Choices, open_choices
from app.utils.errors import ServiceError

Event = dict[str, Any]


class Shape(ABC):
    """How one route writes its answers; made anew for each response."""

    @abstractmethod
    def whole(self, answers: Sequence[Answer], pieces: Sequence[Sequence[Piece]]) -> BaseModel:
        """The response that is not streamed; members that are not set are left out.

        Args:
            answers: In the order of their choices; each is complete.
            pieces: Of each answer.
        """

    @abstractmethod
    def first(self, answers: Sequence[Answer]) -> Iterable[Event]:
        """The events that begin a stream."""

    @abstractmethod
    def piece(self, answer: Answer, piece: Piece) -> Iterable[Event]:
        """The events that bring a piece of an answer."""

    @abstractmethod
    def last(self, answer: Answer) -> Iterable[Event]:
        """The events that end an answer."""

    def end(self, answers: Sequence[Answer]) -> Iterable[Event]:  # noqa: ARG002 - for those that tell something
        """The events that follow when all answers have ended."""
        return ()

    async def settle(self) -> None:  # noqa: B027 - for those that keep something
        """Keep what is to be kept of a complete response, before its end is sent."""

    def frame(self, event: Event) -> bytes:
        """An event as it is sent."""
        return frame(event)

    def fault(self, error: Exception, answers: Sequence[Answer]) -> bytes:  # noqa: ARG002 - for those that tell it
        """What is sent of a fault in mid-stream, when the status line is long gone."""
        return frame(error_content(told_error(error)))


def usage(answers: Sequence[Answer], n: int = 1) -> dict[str, Any]:
    """The members of :class:`Usage`; each ``n`` answers share a prompt, which counts once."""
    reports = [answer.report for answer in answers]
    prompt = sum(report.prompt_tokens for report in reports[::n])
    completion = sum(report.completion_tokens for report in reports)
    cached = sum(report.cached_tokens for report in reports[::n])
    reasoning = sum(report.reasoning_tokens for report in reports)
    dropped = answers[0].dropped_messages
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        **({"completion_tokens_details": {"reasoning_tokens": reasoning}} if reasoning else {}),
        **({"dropped_messages": dropped} if dropped else {}),
    }


async def respond(
    request: Request,
    openings: Sequence[Coroutine[Any, Any, Answer]],
    shape: Shape,
    *,
    stream: bool,
) -> Response:
    """Open the answers and send them in their shape, as a stream or whole.

    Each of ``openings`` opens one answer. When the caller leaves, generating ends.

    Raises:
        ServiceError: An answer was refused, or broke off before the response began.
    """
    if stream:
        choices = await open_choices(openings)
        # Until it is whole.
        request.state.outcome = CLIENT_CLOSED_REQUEST
        return EventStream(_frames(request, choices, shape), choices.aclose)

    async def complete() -> Response:
        choices = await open_choices(openings)
        try:
            content = shape.whole(choices.answers, await choices.collect())
            await shape.settle()
            broken = {name for a in choices.answers for name in a.report.broken_keywords}
        finally:
            await choices.aclose()
        headers = {"X-Schema-Violations": ", ".join(sorted(broken))} if broken else None
        body = content.model_dump_json(exclude_unset=True)
        return Response(body, media_type="application/json", headers=headers)

    response = await unless_disconnected(request, complete())
    return response or Response(status_code=CLIENT_CLOSED_REQUEST)


async def _frames(request: Request, choices: Choices, shape: Shape) -> AsyncIterator[bytes]:
    """The events of a stream; a fault on the way becomes an event too."""
    try:
        for event in shape.first(choices.answers):
            yield shape.frame(event)
        async for answer, piece in choices.pieces():
            for event in shape.last(answer) if piece is None else shape.piece(answer, piece):
                yield shape.frame(event)
        end = list(shape.end(choices.answers))
        await shape.settle()
        for event in end:
            yield shape.frame(event)
        request.state.outcome = 200
    except Exception as error:  # noqa: BLE001 - logged and told to the reader
        request.state.outcome = error.status if isinstance(error, ServiceError) else 500
        yield shape.fault(error, choices.answers)
    yield DONE
