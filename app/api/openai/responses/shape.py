"""How POST /v1/responses writes its answers: items, and the events that make them.

A whole response is what the events of its stream come to.
"""

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
from pydantic_core import to_json

from app.api.errors import error_content
from app.api.openai.responses.answer import ResponseObject
from app.api.openai.shapes import chat_logprobs
from app.api.respond import Event, Shape, usage
from app.api.sse import frame, told_error
from app.llm.tool_calls import CallPiece, Piece, ReasoningPiece
from app.services.answers import Answer

_REASONS = {"length": "max_output_tokens", "content_filter": "content_filter"}


class ResponsesShape(Shape):
    """One response.

    Args:
        response_id: ``resp_`` and a number that its items have too.
        echo: The members that repeat the request.
        logprobs: Whether log-probabilities were asked for.
        keep: Called with the complete response as JSON.
    """

    def __init__(
        self,
        response_id: str,
        echo: Event,
        *,
        logprobs: bool,
        keep: Callable[[bytes], Awaitable[None]],
    ) -> None:
        self._id = response_id
        self._echo = echo
        self._logprobs = logprobs
        self._keep = keep
        self._created = int(time.time())
        self._complete = b""
        self._events = 0
        # Items that are complete, and the one that is not.
        self._output: list[Event] = []
        self._item: Event | None = None
        # Pieces of its text or arguments, and the log-probabilities of its text.
        self._said: list[str] = []
        self._likely: list[Event] = []

    def whole(self, answers: Sequence[Answer], pieces: Sequence[Sequence[Piece]]) -> ResponseObject:
        """The response, once its events have been made."""
        (answer,) = answers
        for piece in pieces[0]:
            list(self.piece(answer, piece))
        list(self.last(answer))
        return ResponseObject(**self._finished(answer))

    def first(self, answers: Sequence[Answer]) -> Iterable[Event]:
        """The response without output."""
        (answer,) = answers
        response = self._response(answer, "in_progress")
        yield self._event("response.created", response=_raw(response))
        yield self._event("response.in_progress", response=_raw(response))

    def piece(self, answer: Answer, piece: Piece) -> Iterator[Event]:
        """A part of the item that is not complete, or of a new one."""
        likely = chat_logprobs(answer.take_logprobs()) if self._logprobs else []
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                yield from self._open_call(piece)
            if piece.arguments:
                self._said.append(piece.arguments)
                yield self._item_event("function_call_arguments.delta", delta=piece.arguments)
            return
        if isinstance(piece, ReasoningPiece):
            if self._item is None or self._item["type"] != "reasoning":
                yield from self._open_reasoning()
            self._said.append(piece.text)
            yield self._item_event("reasoning_text.delta", content_index=0, delta=piece.text)
            return
        if self._item is None or self._item["type"] != "message":
            yield from self._open_message()
        self._said.append(piece)
        self._likely += likely
        yield self._item_event("output_text.delta", content_index=0, delta=piece, logprobs=likely)

    def last(self, answer: Answer) -> Iterator[Event]:
        """The end of the last item; an empty answer is an empty message."""
        if not self._output and self._item is None:
            yield from self._open_message()
        yield from self._close("incomplete" if _reason(answer) else "completed")

    def end(self, answers: Sequence[Answer]) -> Iterable[Event]:
        """The whole response."""
        response = self._finished(answers[0])
        yield self._event(f"response.{response['status']}", response=_raw(response))

    async def settle(self) -> None:
        """Keep the response."""
        await self._keep(self._complete)

    def frame(self, event: Event) -> bytes:
        """One event, with its name."""
        return b"event: %s\n%s" % (event["type"].encode(), frame(event))

    def fault(self, error: Exception, answers: Sequence[Answer]) -> bytes:
        """The event that ends a response which broke off."""
        told = error_content(told_error(error))["error"]
        response = self._response(answers[0], "failed") | {"error": told}
        return self.frame(self._event("response.failed", response=_raw(response)))

    def _event(self, kind: str, **members: Any) -> Event:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **members}

    def _item_event(self, kind: str, **members: Any) -> Event:
        assert self._item is not None  # noqa: S101 - one is open  # nosec B101
        place = {"item_id": self._item["id"], "output_index": len(self._output)}
        return self._event(f"response.{kind}", **place, **members)

    def _open(self, prefix: str, kind: str, **members: Any) -> Iterator[Event]:
        yield from self._close("completed")
        name = f"{prefix}{self._id.removeprefix('resp')}_{len(self._output)}"
        self._item = {"id": name, "type": kind, "status": "in_progress", **members}
        added = {"output_index": len(self._output), "item": dict(self._item)}
        yield self._event("response.output_item.added", **added)

    def _open_message(self) -> Iterator[Event]:
        yield from self._open("msg", "message", role="assistant", content=[])
        yield self._item_event("content_part.added", content_index=0, part=_text("", []))

    def _open_reasoning(self) -> Iterator[Event]:
        yield from self._open("rs", "reasoning", summary=[], content=[])
        part = {"type": "reasoning_text", "text": ""}
        yield self._item_event("content_part.added", content_index=0, part=part)

    def _open_call(self, piece: CallPiece) -> Iterator[Event]:
        called = {"call_id": piece.id, "name": piece.name, "arguments": ""}
        yield from self._open("fc", "function_call", **called)

    def _close(self, status: str) -> Iterator[Event]:
        """The events that end the item, if one is open."""
        if self._item is None:
            return
        said, likely = "".join(self._said), self._likely
        self._said, self._likely = [], []
        if self._item["type"] == "message":
            part = _text(said, likely)
            yield self._item_event("output_text.done", content_index=0, text=said, logprobs=likely)
            yield from self._close_part(part)
        elif self._item["type"] == "reasoning":
            yield self._item_event("reasoning_text.done", content_index=0, text=said)
            yield from self._close_part({"type": "reasoning_text", "text": said})
        else:
            yield self._item_event("function_call_arguments.done", arguments=said)
            self._item["arguments"] = said
        self._item["status"] = status
        done = {"output_index": len(self._output), "item": self._item}
        self._output.append(self._item)
        self._item = None
        yield self._event("response.output_item.done", **done)

    def _close_part(self, part: Event) -> Iterator[Event]:
        yield self._item_event("content_part.done", content_index=0, part=part)
        assert self._item is not None  # noqa: S101 - one is open  # nosec B101
        self._item["content"] = [part]

    def _response(self, answer: Answer, status: str) -> Event:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": answer.model,
            "output": list(self._output),
            "usage": None,
            **self._echo,
            "cached": answer.cached,
        }

    def _finished(self, answer: Answer) -> Event:
        """The complete response, which is kept."""
        reason = _reason(answer)
        response = self._response(answer, "incomplete" if reason else "completed")
        response |= {"completed_at": int(time.time()), "usage": _usage(answer)}
        if reason:
            response["incomplete_details"] = {"reason": reason}
        self._complete = to_json(response)
        return response


def _reason(answer: Answer) -> str | None:
    """Why an answer is not complete, in OpenAI's words."""
    return _REASONS.get(answer.report.finish_reason)


def _text(text: str, logprobs: list[Event]) -> Event:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _raw(response: Event) -> msgspec.Raw:
    # A schema of the request may have numbers of any size, which msgspec does not write.
    return msgspec.Raw(to_json(response))


def _usage(answer: Answer) -> Event:
    counted = usage([answer])
    return {
        "input_tokens": counted.pop("prompt_tokens"),
        "input_tokens_details": counted.pop("prompt_tokens_details"),
        "output_tokens": counted.pop("completion_tokens"),
        "output_tokens_details": counted.pop("completion_tokens_details", {"reasoning_tokens": 0}),
        **counted,
    }
