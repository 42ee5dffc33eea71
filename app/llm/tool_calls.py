"""Parses the calls of tools in a model's answer while it arrives."""

import re
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass

from app.llm.detokenizer import overlap
from app.llm.tools import ToolFormat

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

    Attributes:
        calls: The number of calls so far.
        repeats: Whether a repeated call has ended the answer.
    """

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        self._names = names
        self._trigger = form.trigger
        self._opening_length = len(form.opening)
        # Not \s, which matches more than JSON's white space. The same characters have to match
        # here and where white space is stripped, or the text would depend on how it is cut.
        gap = f"[{_SPACE}]*"
        parts = (r"\{", '"name"', ":", r'"([\w-]+)"', ",", f'"{form.arguments_key}"', ":", "")
        self._head = re.compile(gap + gap.join(parts))
        # Llama writes a semicolon between calls, and nothing after them.
        self._closing = "}" + form.closing
        self._separators = _SPACE if form.closing else _SPACE + ";"
        self._buffer = ""
        self._state: Callable[[list[Piece]], bool] = self._read_text
        self._value = _JsonValue()
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
            self._pass_text(pieces, len(self._buffer) - overlap(self._buffer, self._trigger))
            return False
        body = self._buffer[at + self._opening_length :]
        head = self._head.match(body)
        if head is not None and head[1] in self._names:
            self._pass_text(pieces, at)
            self._buffer = body[head.end() :]
            self._call, self._held = "", []
            self._tell(pieces, CallPiece(self.calls, f"call_{uuid.uuid4().hex[:24]}", head[1]))
            self.calls += 1
            self._value = _JsonValue()
            self._state = self._read_arguments
            return True
        if head is None and len(body) < _LONGEST_HEAD and body.lstrip(_SPACE)[:1] in ("", "{"):
            self._pass_text(pieces, at)
            return False
        self._pass_text(pieces, at + len(self._trigger))
        return True

    def _read_arguments(self, pieces: list[Piece]) -> bool:
        if not self._value.began:
            self._buffer = self._buffer.lstrip(_SPACE)
        length = self._value.feed(self._buffer)
        if length:
            self._tell(pieces, CallPiece(self.calls - 1, arguments=self._buffer[:length]))
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
            self._state = self._read_closing
        self._held = None

    def _drop(self, _: list[Piece]) -> bool:
        """Take no notice of what follows a repeated call."""
        self._buffer = ""
        return False

    def _read_closing(self, _: list[Piece]) -> bool:
        """Skip the text that closes a call; returns whether to go on parsing."""
        rest = self._buffer
        for expected in self._closing:
            rest = rest.lstrip(_SPACE)
            if not rest:
                return False
            if rest[0] != expected:
                break
            rest = rest[1:]
        self._buffer = rest
        self._after_call = True
        self._state = self._read_text
        return True

    def _pass_text(self, pieces: list[Piece], length: int) -> None:
        """Pass on the buffer's first characters without the white space at their end."""
        text = self._buffer[:length].rstrip(_SPACE)
        if text:
            pieces.append(text)
            self._after_call = False
        self._buffer = self._buffer[len(text) :]


class _JsonValue:
    """Finds the end of one JSON value in text that arrives in pieces."""

    def __init__(self) -> None:
        self.began = self.ended = False
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str) -> int:
        """Read further text; returns how many of its characters belong to the value."""
        self.began = self.began or bool(text)
        for position, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif character == '"':
                self._in_string = not self._in_string
                self.ended = self._depth == 0 and not self._in_string
            elif self._in_string:
                self._escaped = character == "\\"
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                if self._depth == 0:
                    # The value is a number or a word, and the object around it ends here.
                    self.ended = True
                    return position
                self._depth -= 1
                self.ended = self._depth == 0
            if self.ended:
                return position + 1
        return len(text)
