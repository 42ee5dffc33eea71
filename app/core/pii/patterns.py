"""Patterns that run in linear time, and the part of a stream that must be held back for them.

A text in pieces can be passed on up to the place where a match may have begun. RE2 does not report
such places, so :func:`prefixes_of` derives a second pattern that matches every prefix of a match.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

import re2  # type: ignore[import-untyped]

# The standard library's parser of patterns, which is not public. Where it changes or fails, a whole
# window is held back, which delays the stream and changes no result. It is imported by name because
# type checkers do not always know the module.
_parser: Any = import_module("re._parser")

WINDOW = 256
"""Most characters of a configured pattern's match."""

_MAX_PATTERN_CHARS = 2000
_MAX_PREFIXES_CHARS = 50_000
# A pattern that can match the empty string does so in one of these texts.
_EMPTY_PROBES = ("", "a", "7", " ", "-", "a b", "\n", "a\n7", "\u00e9")


class LinearPattern:
    """A pattern run by RE2, whose time is linear in the length of the text.

    It has no look-around and no back references; see https://github.com/google/re2/wiki/Syntax.
    ASCII text is passed as bytes, because the conversion of offsets takes most of a call's time.

    Raises:
        ValueError: RE2 rejects the pattern; the message is one line.
    """

    def __init__(self, source: str) -> None:
        options = re2.Options()
        options.log_errors = False  # RE2 would print to standard error.
        try:
            self._compiled: Any = re2.compile(source, options)
        except UnicodeEncodeError:
            raise ValueError("the pattern holds a lone surrogate") from None
        except re2.error as error:
            reason = error.args[0] if error.args else "not a pattern"
            shown = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
            raise ValueError(" ".join(shown.split())) from None

    def search(self, text: str, start: int = 0) -> tuple[int, int] | None:
        r"""The leftmost match at or after ``start``; ``\b`` sees the text before ``start``."""
        found = self._compiled.search(text.encode() if text.isascii() else text, start)
        return found.span() if found else None

    def match(self, text: str, start: int = 0, end: int | None = None) -> tuple[int, int] | None:
        r"""A match at exactly ``start`` that ends by ``end``; ``\b`` sees the text after it."""
        found = self._compiled.match(text.encode() if text.isascii() else text, start, end)
        return found.span() if found else None


class BoundedPattern:
    """A configured pattern whose matches have 1 to :data:`WINDOW` characters.

    Raises:
        ValueError: The pattern cannot be used; the message is one line.
    """

    def __init__(self, source: str) -> None:
        if len(source) > _MAX_PATTERN_CHARS:
            raise ValueError(f"the pattern is longer than {_MAX_PATTERN_CHARS} characters")
        self._pattern = LinearPattern(source)
        if any(self._matches_nothing(probe) for probe in _EMPTY_PROBES):
            raise ValueError("the pattern matches the empty string")
        self.prefixes = prefixes_of(source)

    def _matches_nothing(self, probe: str) -> bool:
        spans = (self._pattern.match(probe, at) for at in range(len(probe) + 1))
        return any(span is not None and span[0] == span[1] for span in spans)

    def first(self, text: str, start: int) -> tuple[int, int] | None:
        """The leftmost match at or after ``start`` of at most :data:`WINDOW` characters.

        Whether there is a match at a place depends only on the character before it and on the
        ``WINDOW + 1`` characters after it, so that a stream finds the same matches as a whole text.
        """
        while (span := self._pattern.search(text, start)) is not None:
            at, end = span
            if end - at > WINDOW:
                # RE2 prefers a long match; a shorter one at the same place may fit.
                span = self._pattern.match(text, at, at + WINDOW)
            if span is not None and span[1] > at:
                return span
            start = at + 1
        return None


class HoldBack:
    """Finds the end of a stream's text that is not yet decided.

    Args:
        prefixes: For each pattern, RE2 source that matches every prefix of its matches. ``None``
            means unknown: :data:`WINDOW` characters are then always held back.
        bound: Most characters held back: those by which every match is decided, at least
            :data:`WINDOW`.
    """

    def __init__(self, prefixes: Iterable[str | None], bound: int) -> None:
        sources = list(prefixes)
        known = [source for source in sources if source is not None]
        self.bound = bound
        self._always = WINDOW if None in sources else 0
        self._pattern: LinearPattern | None = None
        if known:
            try:
                self._pattern = LinearPattern(f"(?:{'|'.join(known)})\\z")
            except ValueError:  # The joined patterns exceed RE2's memory limit.
                self._always = bound

    def cut(self, text: str, start: int) -> int:
        """Index at ``start`` or after it from which ``text`` is undecided."""
        cut = len(text) - self._always
        floor = max(start, len(text) - self.bound)
        if self._pattern is not None and floor < len(text):
            span = self._pattern.search(text[floor:])
            cut = min(cut, floor + span[0]) if span is not None else cut
        return max(start, cut)


def prefixes_of(source: str) -> str | None:
    """RE2 source of a pattern that fully matches every prefix of every match of ``source``.

    It may match more: assertions are dropped, and a negated set becomes any character.

    Returns:
        The source, or ``None`` where Python's parser and RE2's could read ``source`` differently.
    """
    if "{," in source or "[[:" in source:  # RE2 reads literal text and a POSIX class here.
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            parsed = _parser.parse(source)
        flags = "is" if _IGNORES_CASE.search(source) else "s"
        prefixes = f"(?{flags}:{_prefixes(parsed)})"
        if len(prefixes) > _MAX_PREFIXES_CHARS:
            return None
        LinearPattern(f"(?:{prefixes})\\z")
    except Exception:  # noqa: BLE001 - a private parser may fail in any way
        return None
    return prefixes


# Where this is literal text, the derived pattern matches more than it must.
_IGNORES_CASE = re.compile(r"\(\?[a-zA-Z]*i")
_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}
_ANY = "."


def _exact(items: Iterable[tuple[Any, Any]]) -> str:
    return "".join(_exact_item(str(op), value) for op, value in items)


def _prefixes(items: Iterable[tuple[Any, Any]]) -> str:
    # The prefixes of "xy" are those of x, and x followed by those of y.
    result = ""
    for op, value in reversed(list(items)):
        name = str(op)
        if name == "AT":
            continue
        character = _character(name, value)
        if character is not None:
            result = f"(?:{character}{result})?"
            continue
        whole = _exact_item(name, value)
        begun = _prefixes_item(name, value)
        result = f"(?:{begun}|{whole}{result})"
    return result


def _exact_item(name: str, value: Any) -> str:
    if name == "AT":
        return ""
    character = _character(name, value)
    if character is not None:
        return character
    if name in ("MAX_REPEAT", "MIN_REPEAT"):
        low, high, inner = value
        upper = "" if str(high) == "MAXREPEAT" else str(high)
        return f"(?:{_exact(inner)}){{{low},{upper}}}"
    return f"(?:{'|'.join(_exact(part) for part in _parts(name, value))})"


def _prefixes_item(name: str, value: Any) -> str:
    if name in ("MAX_REPEAT", "MIN_REPEAT"):
        _, high, inner = value
        if str(high) != "MAXREPEAT" and high == 0:
            return ""
        before = "*" if str(high) == "MAXREPEAT" else f"{{0,{high - 1}}}"
        return f"(?:{_exact(inner)}){before}{_prefixes(inner)}"
    return f"(?:{'|'.join(_prefixes(part) for part in _parts(name, value))})"


def _parts(name: str, value: Any) -> Sequence[Any]:
    if name == "BRANCH":
        return list(value[1])
    if name == "SUBPATTERN":
        return [value[3]]
    raise ValueError(f"{name} has no RE2 equivalent here")


def _character(name: str, value: Any) -> str | None:
    """The source of an item that matches exactly one character; ``None`` for other items."""
    if name == "LITERAL":
        return _escape(value)
    if name in ("ANY", "NOT_LITERAL"):
        return _ANY
    if name != "IN":
        return None
    parts: list[str] = []
    for op, operand in value:
        kind = str(op)
        if kind == "NEGATE":
            return _ANY
        if kind == "RANGE":
            parts.append(f"{_escape(operand[0])}-{_escape(operand[1])}")
        elif kind == "CATEGORY":
            parts.append(_CATEGORIES[str(operand)])
        else:
            parts.append(_escape(operand))
    return f"[{''.join(parts)}]"


def _escape(codepoint: int) -> str:
    return f"\\x{{{codepoint:x}}}"
