"""Parses the calls of tools in a model's answer while it arrives."""

import json
import re
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from app.llm import notations
from app.llm.detokenizer import overlap
from app.llm.notations import JsonReader
from app.llm.tools import CalledFunction, ToolFormat

CALL_MEMBERS = {"tool_calls", "tool_call_id", "tool_responses", "name", "tools"}
"""What messages for templates may have beside their texts, for tools."""

_SPACE = " \t\r\n"
# A function's name has at most 64 characters; the rest leaves room for white space.
_LONGEST_HEAD = 256


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A part of a call, which has number ``index`` in the answer, from 0.

    Only the first piece has the call's id and the function's name. ``arguments`` is a further part
    of the arguments' JSON text.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class ReasoningPiece:
    """A part of what the model thought, which is no text of the answer."""

    text: str


Piece = str | CallPiece | ReasoningPiece


class ToolCallParser:
    """Splits one answer, which arrives in pieces, into text and calls.

    Text that is not a call of a known function is passed on unchanged. White space around calls is
    dropped. A call that repeats an earlier one ends the answer, and is not passed on: a small model
    that has to call would not stop.

    Args:
        form: How the model writes calls.
        schemas: The schemas of known functions' arguments by the functions' names; ``None``: any
            function is known.

    Attributes:
        calls: The number of calls so far.
        repeats: Whether a repeated call has ended the answer.
    """

    def __init__(
        self, form: ToolFormat, schemas: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self._schemas = schemas
        self._notation = form.notation
        self._trigger = form.trigger
        self._mark_length = len(form.mark)
        self._separator = None if form.separator is None else form.separator.strip(_SPACE)
        self._begin = _Begin(form.head)
        self._opening = form.opening.strip(_SPACE)
        self._foot = form.foot
        # Llama writes a semicolon between calls, and nothing after them.
        self._closing = form.closing or form.fence[:3]
        self._separators = _SPACE if form.mark else _SPACE + ";"
        self._buffer = ""
        self._state: Callable[[list[Piece]], bool] = self._read_text
        self._value: notations.Reader = JsonReader()
        self._fence = form.fence
        self._after_call = False
        self.calls = 0
        self.repeats = False
        # Earlier calls as text, the present one, and its pieces while it may be one of those.
        self._earlier: list[str] = []
        self._call = ""
        self._held: list[Piece] | None = None

    def feed(self, text: str) -> list[Piece]:
        """Parse a further part of the answer; returns the pieces that it completes."""
        self._buffer += text
        pieces: list[Piece] = []
        while self._state(pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        """The pieces held back; call this at the end of the answer."""
        rest, self._buffer = self._buffer, ""
        held, self._held = self._held or [], None
        in_call = self._state != self._read_text
        separates = self._after_call and not rest.strip(self._separators)
        return held if in_call or separates or not rest else [rest]

    def _read_text(self, pieces: list[Piece]) -> bool:
        """Pass on the text before the next call; returns whether to go on parsing."""
        if self._after_call:
            self._buffer = self._buffer.lstrip(self._separators)
        at = self._buffer.find(self._trigger)
        if at < 0:
            self._pass_text(pieces, len(self._buffer) - self._held_back())
            return False
        body = self._buffer[at + self._mark_length :].lstrip(_SPACE)
        waits = len(body) < _LONGEST_HEAD and self._opening.startswith(body)
        # A model may leave out the bracket of a list.
        body = body.removeprefix(self._opening)
        head = self._begin.match(body)
        said = len(self._buffer[:at].rstrip(_SPACE).removesuffix(self._fence))
        if head is not None and self._is_known(head[1]):
            self._pass_text(pieces, said)
            self._begin_call(pieces, head[1], body[head.end() :])
            return True
        if head is None and (waits or self._begin.may_match(body)):
            self._pass_text(pieces, said)
            return False
        self._pass_text(pieces, at + len(self._trigger))
        return True

    def _held_back(self) -> int:
        """How many of the last characters may belong to a call."""
        held = overlap(self._buffer, self._trigger)
        before = self._buffer[: len(self._buffer) - held].rstrip(_SPACE)
        if self._fence and before.endswith(self._fence):
            return len(self._buffer) - len(before) + len(self._fence)
        return held or overlap(self._buffer, self._fence)

    def _is_known(self, name: str) -> bool:
        return self._schemas is None or name in self._schemas

    def _begin_call(self, pieces: list[Piece], name: str, rest: str) -> None:
        self._buffer = rest
        self._call, self._held = "", []
        self._tell(pieces, CallPiece(self.calls, f"call_{uuid.uuid4().hex[:24]}", name))
        self.calls += 1
        self._value = notations.reader(self._notation, (self._schemas or {}).get(name, {}))
        self._state = self._read_arguments

    def _read_arguments(self, pieces: list[Piece]) -> bool:
        if not self._value.began:
            self._buffer = self._buffer.lstrip(_SPACE)
        told, length = self._value.feed(self._buffer)
        if told:
            self._tell(pieces, CallPiece(self.calls - 1, arguments=told))
        self._buffer = self._buffer[length:]
        if self._value.ended:
            self._end_call(pieces)
        return self._value.ended

    def _tell(self, pieces: list[Piece], piece: CallPiece) -> None:
        """Pass on a part of a call once it differs from every earlier call."""
        self._call += f"{piece.name}(" if piece.name else piece.arguments
        if self._held is None:
            pieces.append(piece)
            return
        self._held.append(piece)
        if not any(call.startswith(self._call) for call in self._earlier):
            pieces += self._held
            self._held = None

    def _end_call(self, pieces: list[Piece]) -> None:
        self.repeats = self._call in self._earlier
        if self.repeats:
            self.calls -= 1
            self._state = self._drop
        else:
            pieces += self._held or ()
            self._earlier.append(self._call)
            self._state = self._read_foot
        self._held = None

    def _drop(self, _: list[Piece]) -> bool:
        """Take no notice of what follows a repeated call."""
        self._buffer = ""
        return False

    def _read_foot(self, _: list[Piece]) -> bool:
        """Skip the text that ends a call; returns whether to go on parsing."""
        rest = self._buffer.lstrip(_SPACE)
        if self._foot == "}" and rest.startswith(","):
            # Mistral may write an id behind the arguments.
            self._value = JsonReader()
            self._value.feed("{")
            self._state = self._skip_members
            return True
        return self._skip(self._foot, self._read_next)

    def _skip_members(self, _: list[Piece]) -> bool:
        self._buffer = self._buffer[self._value.feed(self._buffer)[1] :]
        if self._value.ended:
            self._state = self._read_next
        return self._value.ended

    def _read_next(self, pieces: list[Piece]) -> bool:
        """Begin the next call of a list, or go on behind the last."""
        if self._separator is not None:
            rest = self._buffer.lstrip(_SPACE)
            if not rest:
                return False
            separated = rest.startswith(self._separator)
            rest = rest.removeprefix(self._separator)
            head = self._begin.match(rest)
            if separated and head is not None and self._is_known(head[1]):
                self._begin_call(pieces, head[1], rest[head.end() :])
                return True
            if separated and head is None and self._begin.may_match(rest):
                return False
        return self._skip(self._closing, self._read_text)

    def _skip(self, closing: str, state: Callable[[list[Piece]], bool]) -> bool:
        """Skip as much of a text as has come; returns whether to go on parsing."""
        rest = self._buffer
        for expected in closing.replace("\n", ""):
            rest = rest.lstrip(_SPACE)
            if not rest:
                return False
            if rest[0] != expected:
                break
            rest = rest[1:]
        self._buffer = rest
        self._after_call = True
        self._state = state
        return True

    def _pass_text(self, pieces: list[Piece], length: int) -> None:
        """Pass on the buffer's first characters without the white space at their end."""
        text = self._buffer[:length].rstrip(_SPACE)
        if text:
            pieces.append(text)
            self._after_call = False
        self._buffer = self._buffer[len(text) :]


def with_tool_calls(
    messages: Sequence[Mapping[str, Any]], form: ToolFormat
) -> list[Mapping[str, Any]]:
    """Messages with the calls in their texts as templates take them; results are in their order."""
    converted: list[Mapping[str, Any]] = []
    numbers = count()
    rest = deque(messages)
    while rest:
        message = rest.popleft()
        text, found = "", list[CalledFunction]()
        if message["role"] == "assistant":
            text, found = read_calls(message["content"], form)
        if not found:
            converted.append(message)
            continue
        # Mistral's ids have nine letters and digits.
        calls = [_as_call(f"call{next(numbers):05}", function) for function in found]
        results = [
            {**rest.popleft(), "tool_call_id": call["id"], "name": call["function"]["name"]}
            for call in calls
            if rest and rest[0]["role"] == "tool"
        ]
        kept = {k: v for k, v in message.items() if k != "token_ids"}
        converted += _called({**kept, "content": text}, calls, results, form)
    return converted


def _as_call(number: str, function: CalledFunction) -> dict[str, Any]:
    """A call whose arguments are a value, as templates take it; those that are no JSON stay."""
    arguments: Any = function["arguments"]
    with suppress(ValueError, RecursionError):
        arguments = json.loads(arguments)
    return {"id": number, "type": "function", "function": {**function, "arguments": arguments}}


def _called(
    message: Mapping[str, Any],
    calls: list[dict[str, Any]],
    results: list[dict[str, Any]],
    form: ToolFormat,
) -> list[Mapping[str, Any]]:
    """A message that calls, and what came back, in the messages that a template wants."""
    if form.results_in_call:
        told = [{"name": r["name"], "response": r["content"]} for r in results]
        return [{**message, "tool_calls": calls, "tool_responses": told}]
    if not form.is_single:
        return [{**message, "tool_calls": calls}, *results]
    if message["content"] and (reasoning := message.get("reasoning_content")):
        # The template of gpt-oss takes one of the two.
        both = f"{reasoning}\n{message['content']}"
        message = {**message, "content": "", "reasoning_content": both}
    each: list[Mapping[str, Any]] = []
    for i, call in enumerate(calls):
        said = message if i == 0 else {"role": message["role"], "content": ""}
        each += [{**said, "tool_calls": [call]}, *results[i : i + 1]]
    return each


def read_calls(
    text: str, form: ToolFormat, schemas: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[str, list[CalledFunction]]:
    """The text of a whole answer without its calls, and the calls; see :class:`ToolCallParser`."""
    parser = ToolCallParser(form, schemas)
    said, calls = "", list[CalledFunction]()
    for piece in (*parser.feed(text), *parser.flush()):
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                calls.append({"name": piece.name, "arguments": ""})
            calls[-1]["arguments"] += piece.arguments
        elif isinstance(piece, str):
            said += piece
    return said, calls


def escaped_around_calls(text: str, form: ToolFormat, escape: Callable[[str], str]) -> str:
    """An answer's text with all escaped that its calls do not consist of."""
    said, calls = read_calls(text, form)
    if not calls:
        return escape(text)
    clean: list[CalledFunction] = [
        {"name": call["name"], "arguments": escape(call["arguments"])} for call in calls
    ]
    return "\n".join([*([escape(said)] if said else []), form.written(clean)])


class _Begin:
    """Finds the text before a call's arguments, which holds the function's name."""

    def __init__(self, head: str) -> None:
        # Not \s, which matches more than JSON's white space. The same characters have to match
        # here and where white space is stripped, or the text would depend on how it is cut.
        gap = f"[{_SPACE}]*"
        parts: list[str] = re.findall(r'"[^"]*"|[{}:,]|[^\s{}:,"]+', head)
        escaped = [re.escape(part).replace("NAME", r"([\w-]+)") for part in parts]
        self._pattern = re.compile(gap + gap.join((*escaped, "")))
        self._first, named, self._last = parts[0].partition("NAME")
        self._is_named = bool(named)

    def match(self, text: str) -> re.Match[str] | None:
        """The beginning of a call at the beginning of a text; its group is the name."""
        return self._pattern.match(text)

    def may_match(self, text: str) -> bool:
        """Whether the text may become a match when more of it has come."""
        text = text.lstrip(_SPACE)
        if len(text) >= _LONGEST_HEAD or not self._first.startswith(text[: len(self._first)]):
            return False
        if not self._is_named or len(text) < len(self._first):
            return True
        last = re.sub(r"^[\w-]+", "", text[len(self._first) :])
        return self._last.startswith(last[: len(self._last)])
