"""How models write a call's arguments: as JSON, or in a notation of their own.

A reader makes JSON of arguments while they arrive.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from app.llm.detokenizer import overlap
from app.llm.ebnf import keywords
from app.llm.ebnf.errors import GrammarError
from app.llm.protocol import Notation

GEMMA_QUOTE: Final = '<|"|>'
"""The text on both sides of a string of Gemma 4, which has no escapes."""

BEFORE_NAME: Final = "<parameter="
BEHIND_NAME: Final = ">\n"
BEHIND_VALUE: Final = "\n</parameter>\n"

_SPACE = " \t\r\n"
# Longest name of an argument that is waited for.
_LONGEST_NAME = 256
# A bare word of Gemma's, or a name.
_WORD, _KEY = re.compile(r"[^,}\]]+"), re.compile(r"[^:,}\]]+")
# Templates write these as Python does.
_PYTHON = {"True": "true", "False": "false", "None": "null"}


def reader(notation: Notation, schema: Mapping[str, Any]) -> "Reader":
    """A reader of arguments; their schema tells the types of what Qwen writes without quotes."""
    if notation == "xml":
        return _XmlReader(schema)
    return _GemmaReader() if notation == "gemma" else JsonReader()


def written(notation: Notation, arguments: str) -> str:
    """Arguments, which are JSON text, as the model writes them; what is no object stays."""
    if notation == "json":
        return arguments or "{}"
    with suppress(ValueError, RecursionError):
        given = json.loads(arguments or "{}")
        if isinstance(given, dict) and notation == "gemma":
            return gemma(given)[1:-1]
        if isinstance(given, dict):
            parts = (f"{BEFORE_NAME}{k}{BEHIND_NAME}{xml(v)}" for k, v in given.items())
            return "".join(f"{part}{BEHIND_VALUE}" for part in parts)
    return arguments


def xml(value: Any) -> str:
    """One argument's value in Qwen's notation."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def gemma(value: Any) -> str:
    """A value in Gemma 4's notation."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{gemma(v)}" for name, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(gemma, value)) + "]"
    return f"{GEMMA_QUOTE}{value}{GEMMA_QUOTE}" if isinstance(value, str) else json.dumps(value)


class JsonReader:
    """Finds the end of one JSON value in text that arrives in pieces."""

    def __init__(self) -> None:
        self.began = self.ended = False
        self._depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str) -> tuple[str, int]:
        """The part of the value in a further text, and how many of its characters were read."""
        length = self._length(text)
        return text[:length], length

    def _length(self, text: str) -> int:
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


class _MarkedReader(ABC):
    """Reads arguments part by part; what may become a mark waits for the text behind it."""

    def __init__(self) -> None:
        self.began = self.ended = False
        # The mark behind the text that is being read; empty outside of one.
        self._mark = ""

    def feed(self, text: str) -> tuple[str, int]:
        """The JSON that a further part completes, and how many of its characters were read.

        The others come again at the beginning of the next part.
        """
        out: list[str] = []
        at = 0
        self.began = self.began or bool(text)
        while at < len(text) and not self.ended:
            read = self._text(text, at, out) if self._mark else self._next(text, at, out)
            if not read:
                break
            at += read
        return "".join(out), at

    def _text(self, text: str, at: int, out: list[str]) -> int:
        """Read text before a mark; returns the number of characters."""
        end = text.find(self._mark, at)
        stop = end if end >= 0 else len(text) - overlap(text[at:], self._mark)
        self._pass(text[at:stop], out)
        if end < 0:
            return stop - at
        read = end + len(self._mark) - at
        self._mark = ""
        self._close(out)
        return read

    @abstractmethod
    def _next(self, text: str, at: int, out: list[str]) -> int:
        """Read what is no text; returns the number of characters."""

    def _pass(self, text: str, out: list[str]) -> None:
        out.append(_escaped(text))

    def _close(self, out: list[str]) -> None:
        out.append('"')


class _XmlReader(_MarkedReader):
    """Reads ``<parameter=name>``, a value and ``</parameter>``, each on lines of their own."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        super().__init__()
        self._schema = schema
        self._before = "{"
        self._kinds: set[str] = set()
        self._is_new = False
        self._value = ""

    def _next(self, text: str, at: int, out: list[str]) -> int:
        rest = text[at:].lstrip(_SPACE)
        space = len(text) - at - len(rest)
        name, closed, value = rest.removeprefix(BEFORE_NAME).partition(">")
        if not rest or BEFORE_NAME.startswith(rest):
            return space
        if not rest.startswith(BEFORE_NAME) or len(name) > _LONGEST_NAME:
            out.append("}" if self._before != "{" else "{}")
            self.ended = True
            return space
        if not closed or not value:
            return space
        # A value that begins on the next line ends on a line before the mark's.
        self._mark = BEHIND_VALUE.rstrip() if value[0] == "\n" else BEHIND_VALUE.strip()
        self._is_new, self._value = value[0] == "\n", ""
        self._kinds = _kinds_of(self._schema, name)
        out.append(f"{self._before}{json.dumps(name, ensure_ascii=False)}: ")
        out.append('"' if self._kinds == {"string"} else "")
        self._before = ", "
        return space + len(BEFORE_NAME) + len(name) + 1

    def _pass(self, text: str, out: list[str]) -> None:
        if self._is_new and text:
            text, self._is_new = text[1:], False
        if self._kinds == {"string"}:
            out.append(_escaped(text))
        else:
            self._value += text

    def _close(self, out: list[str]) -> None:
        out.append('"' if self._kinds == {"string"} else _bare(self._value, self._kinds))


class _GemmaReader(_MarkedReader):
    """Reads the members of an object whose names and words have no quotes."""

    def __init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self._at_name = True

    def _next(self, text: str, at: int, out: list[str]) -> int:
        if not self._open:
            self._open.append("{")
            out.append("{")
        character = text[at]
        if character in _SPACE:
            return 1
        if text.startswith(GEMMA_QUOTE, at):
            self._mark, self._at_name = GEMMA_QUOTE, False
            out.append('"')
            return len(GEMMA_QUOTE)
        if GEMMA_QUOTE.startswith(text[at:]):
            return 0
        if character in "{}[],:":
            return self._structure(character, out)
        found = (_KEY if self._at_name else _WORD).match(text, at)
        if found is None or found.end() == len(text):
            return 0
        word = found[0].strip()
        out.append(json.dumps(word, ensure_ascii=False) if self._at_name else _bare(word, set()))
        self._at_name = False
        return found.end() - at

    def _structure(self, character: str, out: list[str]) -> int:
        if character in "}]":
            out.append("}" if self._open.pop() == "{" else "]")
            self.ended = not self._open
        else:
            out.append(f"{character} " if character in ",:" else character)
        if character in "{[":
            self._open.append(character)
        self._at_name = character in "{," and self._open[-1:] == ["{"]
        # The last bracket stands behind the arguments, see Notation.
        return 0 if self.ended else 1


Reader = JsonReader | _XmlReader | _GemmaReader
"""Reads the arguments of one call, of which it tells whether they ``began`` and ``ended``."""


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _bare(text: str, kinds: set[str]) -> str:
    """The JSON of a value without quotes, which is of one of these types or, if none, of any."""
    found = _PYTHON.get(text.strip(), text)
    with suppress(ValueError, RecursionError):
        value = json.loads(found, parse_constant=_refuse)
        if not kinds or keywords.kind(value) in kinds:
            return found.strip()
    return json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def _kinds_of(schema: Mapping[str, Any], name: str) -> set[str]:
    """The types that an argument may have, as :func:`keywords.kind` names them; none: any."""
    with suppress(GrammarError, RecursionError):
        target = keywords.target(schema, schema)
        properties, _ = keywords.members(target)
        return _kinds(schema, properties.get(name, target.get("additionalProperties")))
    return set()


def _kinds(root: Mapping[str, Any], schema: Any) -> set[str]:
    found = keywords.target(root, schema)
    parts = [p for k in ("anyOf", "oneOf", "allOf") for p in found.get(k) or ()]
    if not parts:
        named = keywords.kinds(found)
        return named | {"null"} if named and found.get("nullable") is True else named
    each = [_kinds(root, part) for part in parts]
    return set().union(*each) if all(each) else set()
