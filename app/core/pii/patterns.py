"""Patterns that run in linear time, and how much of a stream they need to see.

A text that comes in pieces can be cut wherever no match can be under way. RE2 cannot say that of
itself, so :func:`prefixes_of` derives, from a pattern, a second one that matches everything a
match may begin with; where that one matches the end of what has come, the text is held back.
"""

import warnings
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

import re2  # type: ignore[import-untyped]

# The parser of the standard library. It is not public: where it changes or fails, the caller
# falls back to holding back a whole window, which is slower to stream and just as right. Imported
# by its name, since whether type checkers know the module depends on what else they have read.
_parser: Any = import_module("re._parser")

WINDOW = 256
"""Most characters a configured pattern sees, from where its match begins."""

_MAX_PATTERN_CHARS = 2000
_MAX_PREFIXES_CHARS = 50_000
# Anything that matches the empty string somewhere does so in one of these.
_EMPTY_PROBES = ("", "a", "7", " ", "-", "a b", "\n", "a\n7", "\u00e9")


class LinearPattern:
    """A pattern run by RE2, whose time is linear in the text whatever the pattern.

    Look-around and back references are therefore not available; see
    https://github.com/google/re2/wiki/Syntax. ASCII text is handed over as bytes, which spares the
    binding its conversion of offsets, most of the time that a call takes.
    """

    def __init__(self, source: str) -> None:
        """Compile.

        Raises:
            ValueError: In one line, what RE2 says is wrong.
        """
        options = re2.Options()
        options.log_errors = False  # It would print to the standard error on its own.
        try:
            self._compiled: Any = re2.compile(source, options)
        except UnicodeEncodeError:
            raise ValueError("the pattern holds a lone surrogate") from None
        except re2.error as error:
            reason = error.args[0] if error.args else "not a pattern"
            shown = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
            raise ValueError(" ".join(shown.split())) from None

    def search(self, text: str, start: int = 0) -> tuple[int, int] | None:
        r"""The leftmost match at or after ``start``; what stands before counts for ``\b``."""
        found = self._compiled.search(text.encode() if text.isascii() else text, start)
        return found.span() if found else None

    def match(self, text: str, start: int = 0, end: int | None = None) -> tuple[int, int] | None:
        r"""A match at exactly ``start`` that ends by ``end``; what follows counts for ``\b``."""
        found = self._compiled.match(text.encode() if text.isascii() else text, start, end)
        return found.span() if found else None


class BoundedPattern:
    """A configured pattern, checked, whose matches have at most :data:`WINDOW` characters.

    Attributes:
        prefixes: See :func:`prefixes_of`; ``None`` where it cannot be derived.
    """

    def __init__(self, source: str) -> None:
        """Compile and check.

        Raises:
            ValueError: In one line, why the pattern cannot be used.
        """
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
        """The leftmost match at or after ``start`` that fits the window.

        Whether there is a match at a place depends on the character before it and on the
        ``WINDOW + 1`` after it, so that a stream finds what the whole text has.
        """
        while (span := self._pattern.search(text, start)) is not None:
            at, end = span
            if end - at > WINDOW:
                # RE2 prefers this match over a shorter one that a stream would have to take.
                span = self._pattern.match(text, at, at + WINDOW)
            if span is not None and span[1] > at:
                return span
            start = at + 1
        return None


class HoldBack:
    """Says how much of a text can be decided before the rest of it has come.

    Attributes:
        bound: Most characters ever held back.
    """

    def __init__(self, prefixes: Iterable[str | None], bound: int) -> None:
        """Join the patterns.

        Args:
            prefixes: Of each thing that is looked for, what it may begin with, as RE2 source; one
                ``None`` means unknown, and then :data:`WINDOW` characters are always held.
            bound: What is looked for is decided by this many characters after its beginning; at
                least :data:`WINDOW`.
        """
        sources = list(prefixes)
        known = [source for source in sources if source is not None]
        self.bound = bound
        self._always = WINDOW if None in sources else 0
        self._pattern: LinearPattern | None = None
        if known:
            try:
                self._pattern = LinearPattern(f"(?:{'|'.join(known)})\\z")
            except ValueError:  # Too many patterns together for RE2's memory limit.
                self._always = bound

    def cut(self, text: str, start: int) -> int:
        """Where the undecided end of ``text`` begins, at ``start`` or after it."""
        cut = len(text) - self._always
        floor = max(start, len(text) - self.bound)
        if self._pattern is not None and floor < len(text):
            span = self._pattern.search(text[floor:])
            cut = min(cut, floor + span[0]) if span is not None else cut
        return max(start, cut)


def prefixes_of(source: str) -> str | None:
    """RE2 source of a pattern that fully matches every beginning of every match of ``source``.

    It may match more: assertions are dropped, and a negated set becomes any character. ``None``
    where Python's parser and RE2's might read the pattern differently.
    """
    if "{," in source or "[[:" in source:  # Literal text, and a POSIX class, to RE2 alone.
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            parsed = _parser.parse(source)
        derived = _Derivation()
        body = derived.prefixes(parsed)
        flags = "is" if parsed.state.flags & _IGNORECASE or derived.ignores_case else "s"
        prefixes = f"(?{flags}:{body})"
        if len(prefixes) > _MAX_PREFIXES_CHARS:
            return None
        LinearPattern(f"(?:{prefixes})\\z")
    except Exception:  # noqa: BLE001 - a private parser may fail in any way, and that is allowed
        return None
    return prefixes


_IGNORECASE = 2  # re.IGNORECASE, as the parser's flags have it.
_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}
_ANY = "."


class _Derivation:
    """Writes a parsed pattern, or its prefixes, back as RE2 source."""

    def __init__(self) -> None:
        self.ignores_case = False

    def exact(self, items: Iterable[tuple[Any, Any]]) -> str:
        return "".join(self._exact_item(str(op), value) for op, value in items)

    def prefixes(self, items: Iterable[tuple[Any, Any]]) -> str:
        # The prefixes of "xy" are those of x, and x itself before those of y.
        result = ""
        for op, value in reversed(list(items)):
            name = str(op)
            if name == "AT":
                continue
            character = self._character(name, value)
            if character is not None:
                result = f"(?:{character}{result})?"
                continue
            whole = self._exact_item(name, value)
            begun = self._prefixes_item(name, value)
            result = f"(?:{begun}|{whole}{result})"
        return result

    def _exact_item(self, name: str, value: Any) -> str:
        if name == "AT":
            return ""
        character = self._character(name, value)
        if character is not None:
            return character
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, inner = value
            upper = "" if str(high) == "MAXREPEAT" else str(high)
            return f"(?:{self.exact(inner)}){{{low},{upper}}}"
        return f"(?:{'|'.join(self.exact(part) for part in self._parts(name, value))})"

    def _prefixes_item(self, name: str, value: Any) -> str:
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            _, high, inner = value
            if str(high) != "MAXREPEAT" and high == 0:
                return ""
            before = "*" if str(high) == "MAXREPEAT" else f"{{0,{high - 1}}}"
            return f"(?:{self.exact(inner)}){before}{self.prefixes(inner)}"
        return f"(?:{'|'.join(self.prefixes(part) for part in self._parts(name, value))})"

    def _parts(self, name: str, value: Any) -> Sequence[Any]:
        if name == "BRANCH":
            return list(value[1])
        if name == "SUBPATTERN":
            _, added, _, inner = value
            self.ignores_case = self.ignores_case or bool(added & _IGNORECASE)
            return [inner]
        raise ValueError(f"{name} has no RE2 equivalent here")

    def _character(self, name: str, value: Any) -> str | None:
        """The source of an item that takes exactly one character, else ``None``."""
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
