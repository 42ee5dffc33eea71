"""Screens JSON that comes in pieces, so that it stays JSON and escapes hide nothing.

Each string is decoded, screened as a text, and encoded again. A number is screened as a whole. Text
that is no JSON is screened as text.
"""

import json
import re
from collections.abc import Callable
from typing import Protocol

from app.llm.detokenizer import overlap


class TextScreen(Protocol):
    """Screens one text that comes in pieces."""

    @property
    def blocked(self) -> bool:
        """Whether a blocked pattern has ended the text."""

    def feed(self, text: str) -> str:
        """What may be passed on, now that ``text`` has come."""

    def flush(self) -> str:
        """What was held back, once no more text comes."""


_PLAIN = re.compile(r'[^"\\]+')
_HEX = "[0-9a-fA-F]"
_HIGH, _LOW = f"[dD][89abAB]{_HEX}{{2}}", f"[dD][c-fC-F]{_HEX}{{2}}"
_ESCAPE = re.compile(rf"\\u{_HIGH}\\u{_LOW}|\\u{_HEX}{{4}}|\\[^u]", re.DOTALL)
# What may become an escape, or the first half of a character beyond U+FFFF.
_BEGUN = re.compile(rf"\\(?:u{_HEX}{{0,3}}|u{_HIGH}(?:\\(?:u(?:[dD](?:[c-fC-F]{_HEX}?)?)?)?)?)?\Z")
_STRUCTURE = re.compile(r'[{}\[\],:"]')
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
# A longer number is screened as text, since it could not be held back.
_LONGEST_NUMBER = 64
_MOST_SPACE = 256


class JsonScreen:
    """Screens one JSON value, or all that comes where ``whole`` is true.

    Args:
        open_text: Opens a screen for one text; it gets the text before it, which is the name of the
            member whose value it is.
        numbers_stay: Whether a number is passed on even if it is personal data, because a schema
            asks for one; otherwise a string takes its place.
        whole: Whether the answer is JSON to its end.

    Attributes:
        ended: Whether the value is complete.
    """

    def __init__(
        self, open_text: Callable[[str], TextScreen], *, numbers_stay: bool, whole: bool
    ) -> None:
        self._open = open_text
        self._numbers_stay = numbers_stay
        self._whole = whole
        self._screen: TextScreen | None = None
        self._in_string = False
        self._rest = ""  # An escape or a number that may go on.
        self._last = self._before = ""
        self._depth = 0
        self.ended = self.blocked = False

    def feed(self, text: str) -> str:
        """What may be passed on, now that ``text`` has come."""
        return self.read(text)[0]

    def read(self, text: str) -> tuple[str, int]:
        """The same, and how many characters of ``text`` belong to the value."""
        before = len(self._rest)
        text, self._rest = self._rest + text, ""
        out: list[str] = []
        at = 0
        while at < len(text) and not (self.ended or self.blocked):
            at = self._read_string(text, at, out) if self._in_string else self._read(text, at, out)
        return "".join(out), at - before

    def flush(self) -> str:
        """What was held back; the value may be incomplete."""
        rest, self._rest = self._rest, ""
        if self._in_string:
            return "" if self.blocked else self._close() + rest
        return self._end_token(rest)

    def _read_string(self, text: str, at: int, out: list[str]) -> int:
        decoded: list[str] = []
        while at < len(text) and text[at] != '"':
            if _BEGUN.match(text, at):
                self._rest, at = text[at:], len(text)
                break
            found = _PLAIN.match(text, at) or _ESCAPE.match(text, at)
            # A backslash that begins no escape is taken for itself.
            part = found[0] if found else text[at]
            decoded.append(_decode(part) if part[0] == "\\" else part)
            at += len(part)
        out.append(self._pass("".join(decoded)))
        if at < len(text) and not self.blocked:
            out.append(self._end_string())
            at += 1
        return at

    def _read(self, text: str, at: int, out: list[str]) -> int:
        """Read a token between strings, and the character of JSON's structure that ends it."""
        found = _STRUCTURE.search(text, at)
        token = text[at : found.start() if found else len(text)]
        if found is None:
            out.append(self._begin_token(token))
            return len(text)
        out.append(self._end_token(token))
        if self.blocked:
            return len(text)
        character = found[0]
        out.append(character)
        if character == '"':
            self._in_string, self._last = True, ""
            self._screen = self._open(self._before)
        elif character == ":":
            self._before = f"{self._last}: "
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._before = ""
            self._depth -= 1
            self.ended = self._depth <= 0 and not self._whole
        return found.end()

    def _begin_token(self, token: str) -> str:
        """Pass on the part of a token that is not a number."""
        number = token.lstrip()
        if self._screen is None:
            if not number or (number[0] in "-0123456789" and len(number) <= _LONGEST_NUMBER):
                self._rest = number
                return token[: len(token) - len(number)]
            if number[-1].isspace() and _NUMBER.fullmatch(number.rstrip()):
                return self._end_token(token)
        return self._text(token)

    def _end_token(self, token: str) -> str:
        number = token.strip()
        if self._screen is None and (not number or _NUMBER.fullmatch(number)):
            if not number or self._numbers_stay:
                return token
            passed = self._text(number) + self._close_text()
            return token.replace(number, passed if passed == number else json.dumps(passed))
        return self._text(token) + self._close_text()

    def _text(self, text: str) -> str:
        if self._screen is None:
            self._screen = self._open(self._before)
        passed = self._screen.feed(text)
        self.blocked = self._screen.blocked
        return passed

    def _close_text(self) -> str:
        screen, self._screen = self._screen, None
        if screen is None:
            return ""
        passed = screen.flush()
        self.blocked = self.blocked or screen.blocked
        return passed

    def _end_string(self) -> str:
        self._in_string = False
        rest = self._close()
        return rest if self.blocked else f'{rest}"'

    def _pass(self, decoded: str) -> str:
        self._last = (self._last + decoded)[-_MOST_SPACE:]
        return _encode(self._text(decoded))

    def _close(self) -> str:
        return _encode(self._close_text())


def _decode(escape: str) -> str:
    try:
        character: str = json.loads(f'"{escape}"')
    except ValueError:
        return escape
    return character


def _encode(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


class CallsScreen:
    """Screens an answer in which each ``trigger`` begins a call of a tool, which is JSON.

    Args:
        trigger: The text before a call, or its first characters.
        open_text: Opens a screen for one text, which gets the text before it.
        open_json: Opens a screen for one call.
    """

    def __init__(
        self,
        trigger: str,
        open_text: Callable[[str], TextScreen],
        open_json: Callable[[], JsonScreen],
    ) -> None:
        self._trigger = trigger
        self._open_text, self._open_json = open_text, open_json
        self._text = open_text("")
        self._json: JsonScreen | None = None
        self._rest = ""

    @property
    def blocked(self) -> bool:
        """Whether a blocked pattern has ended the answer."""
        return self._text.blocked or (self._json is not None and self._json.blocked)

    def feed(self, text: str) -> str:
        """What may be passed on, now that ``text`` has come."""
        self._rest += text
        out: list[str] = []
        while self._rest and not self.blocked:
            held = self._rest
            out.append(self._read_text() if self._json is None else self._read_call(self._json))
            if self._rest == held:
                break
        return "".join(out)

    def flush(self) -> str:
        """What was held back."""
        if self._json is not None:
            return self._json.flush()
        return self._text.feed(self._rest) + self._text.flush()

    def _read_call(self, call: JsonScreen) -> str:
        passed, length = call.read(self._rest)
        self._rest = self._rest[length:]
        if call.ended:
            self._json, self._text = None, self._open_text("")
        return passed

    def _read_text(self) -> str:
        at = self._rest.find(self._trigger)
        if at < 0:
            return self._pass(len(self._rest) - overlap(self._rest, self._trigger))
        begin = at if self._trigger[0] == "{" else at + len(self._trigger)
        call = self._rest[begin : begin + _MOST_SPACE].lstrip()
        if not call and len(self._rest) - begin < _MOST_SPACE:
            return self._pass(at)
        if call[:1] not in ("{", "["):
            return self._pass(begin)
        passed = self._pass(begin) + self._text.flush()
        self._json = self._open_json()
        return passed

    def _pass(self, length: int) -> str:
        text, self._rest = self._rest[:length], self._rest[length:]
        return self._text.feed(text)
