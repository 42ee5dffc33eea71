"""Parses regular expressions.

Supported is the subset of ECMA-262 that JSON Schema recommends, and more: alternatives, groups,
classes, the usual escapes and quantifiers. Lookarounds and backreferences are rejected.
"""

import math
import string
from dataclasses import dataclass

from app.llm.ebnf import writer
from app.llm.ebnf.errors import GrammarError
from app.llm.ebnf.writer import Range, Ranges

_MAX_LENGTH = 10_000
_MAX_DEPTH = 32
# xgrammar counts more repetitions at run time, which takes a second for each token.
_MAX_COUNT = 128

# The characters that a letter after a backslash stands for.
_ESCAPES: dict[str, list[Range]] = {
    "d": [(0x30, 0x39)],
    "w": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "s": [(0x09, 0x0D), (0x20, 0x20)],
}
# Negated classes hold ASCII only: dialects differ on which other letters are in them.
_ESCAPES |= {
    name.upper(): [(a, min(b, 0x7F)) for a, b in writer.complement(ranges) if a <= 0x7F]
    for name, ranges in _ESCAPES.items()
}
_ESCAPES |= {name: [(code, code)] for name, code in zip("nrtfv0", b"\n\r\t\f\v\0", strict=True)}


@dataclass(frozen=True)
class Characters:
    """One character of these ranges."""

    ranges: Ranges


@dataclass(frozen=True)
class Sequence:
    """The parts, one after the other."""

    parts: tuple["Node", ...]


@dataclass(frozen=True)
class Alternatives:
    """One of the options."""

    options: tuple["Node", ...]


@dataclass(frozen=True)
class Repeat:
    """The part, ``least`` to ``most`` times; ``None`` is no limit."""

    part: "Node"
    least: int
    most: int | None


@dataclass(frozen=True)
class Anchor:
    """The beginning or the end of the text."""

    character: str


Node = Characters | Sequence | Alternatives | Repeat | Anchor

_ANY_TEXT = Repeat(Characters(tuple(writer.complement([]))), 0, None)


def parse(pattern: str, *, whole: bool) -> Node:
    """Parse a regular expression into a tree without anchors.

    A ``whole`` expression has to match the whole text. Otherwise other text may come before and
    after a match where there is no anchor, as in JSON Schema.

    Raises:
        GrammarError: The expression is malformed, too large, or uses an unsupported feature.
    """
    if len(pattern) > _MAX_LENGTH:
        raise GrammarError(f"a regular expression has more than {_MAX_LENGTH} characters")
    return _anchored(_Parser(pattern).parse(), whole=whole)


class _Parser:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0

    def parse(self) -> Node:
        node = self._alternatives()
        if self._at < len(self._pattern):
            raise GrammarError("a regular expression closes a group that is not open")
        return node

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self) -> str:
        character = self._peek()
        if not character:
            raise GrammarError("a regular expression ends too early")
        self._at += 1
        return character

    def _takes(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _alternatives(self) -> Node:
        options = [self._sequence()]
        while self._takes("|"):
            options.append(self._sequence())
        return options[0] if len(options) == 1 else Alternatives(tuple(options))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._peek() and self._peek() not in "|)":
            parts.append(self._quantified(self._atom()))
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _quantified(self, node: Node) -> Node:
        quantified = False
        while (bounds := self._quantifier()) is not None:
            if quantified or isinstance(node, Anchor):
                raise GrammarError("a regular expression repeats what cannot be repeated")
            node = Sequence(()) if bounds == (0, 0) else Repeat(node, *bounds)
            quantified = True
            # A lazy quantifier matches the same texts.
            self._takes("?")
        return node

    def _quantifier(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._takes(sign):
                return bounds
        end = self._pattern.find("}", self._at)
        if self._peek() != "{" or end < 0:
            return None
        first, comma, second = self._pattern[self._at + 1 : end].partition(",")
        if not first.isdecimal() or not (second.isdecimal() or not second):
            raise GrammarError("a regular expression has a malformed quantifier")
        self._at = end + 1
        least = int(first[:9])
        most = (int(second[:9]) if second else None) if comma else least
        if max(least, most or 0) > _MAX_COUNT:
            raise GrammarError(f"a regular expression repeats more than {_MAX_COUNT} times")
        if most is not None and most < least:
            raise GrammarError("a regular expression has a malformed quantifier")
        return least, most

    def _atom(self) -> Node:
        character = self._take()
        if character == "(":
            return self._group()
        if character == "[":
            return self._class()
        if character == ".":
            return Characters(tuple(writer.complement([(0x0A, 0x0A), (0x0D, 0x0D)])))
        if character in "^$":
            return Anchor(character)
        if character == "\\":
            return Characters(tuple(self._escape()))
        if character in "*+?":
            raise GrammarError("a regular expression repeats what cannot be repeated")
        return Characters(((ord(character), ord(character)),))

    def _group(self) -> Node:
        if self._takes("?") and not self._takes(":"):
            named = self._takes("P<") or self._takes("<")
            end = self._pattern.find(">", self._at)
            if not named or end < 0 or not self._pattern[self._at : end].isidentifier():
                raise GrammarError("a regular expression looks around, or sets a flag")
            self._at = end + 1
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise GrammarError(f"a regular expression nests more than {_MAX_DEPTH} groups")
        node = self._alternatives()
        self._depth -= 1
        if not self._takes(")"):
            raise GrammarError("a regular expression leaves a group open")
        return node

    def _class(self) -> Node:
        negated = self._takes("^")
        ranges: list[Range] = []
        while not self._takes("]"):
            first = self._member()
            if self._peek() == "-" and self._pattern[self._at + 1 : self._at + 2] not in {"]", ""}:
                self._at += 1
                last = self._member()
                if not first[0][0] == first[-1][1] <= last[0][0] == last[-1][1]:
                    raise GrammarError("a regular expression has a malformed range of characters")
                first = [(first[0][0], last[0][0])]
            ranges += first
        # A range may span the surrogates, which neither has.
        ranges = writer.complement(ranges) if negated else writer.without(ranges, [])
        if not ranges:
            raise GrammarError("a regular expression has an empty class")
        return Characters(tuple(ranges))

    def _member(self) -> list[Range]:
        character = self._take()
        if character == "\\":
            return [(0x08, 0x08)] if self._takes("b") else self._escape()
        return [(ord(character), ord(character))]

    def _escape(self) -> list[Range]:
        character = self._take()
        if character in _ESCAPES:
            return _ESCAPES[character]
        if digits := {"x": 2, "u": 4}.get(character):
            code = self._pattern[self._at : self._at + digits]
            if len(code) < digits or not set(code) <= set(string.hexdigits):
                raise GrammarError("a regular expression has a malformed escape")
            self._at += digits
            if 0xD800 <= int(code, 16) <= 0xDFFF:
                raise GrammarError("a regular expression has half a character")
            return [(int(code, 16), int(code, 16))]
        if character.isalnum():
            raise GrammarError(f"a regular expression has \\{character}, which is not supported")
        return [(ord(character), ord(character))]


def _anchored(node: Node, *, whole: bool) -> Node:
    """Remove the anchors of each alternative, and add any text where there is none."""
    if isinstance(node, Alternatives):
        return Alternatives(tuple(_anchored(option, whole=whole) for option in node.options))
    parts = list(node.parts) if isinstance(node, Sequence) else [node]
    starts = bool(parts) and parts[0] == Anchor("^")
    parts = parts[starts:]
    ends = bool(parts) and parts[-1] == Anchor("$")
    parts = parts[: len(parts) - ends]
    before = [] if starts or whole else [_ANY_TEXT]
    after = [] if ends or whole else [_ANY_TEXT]
    parts = [*before, *parts, *after]
    return parts[0] if len(parts) == 1 else Sequence(tuple(parts))


def lengths(node: Node) -> tuple[int, float]:
    """Minimum and maximum number of characters of a match; ``math.inf`` is no limit."""
    match node:
        case Sequence(parts):
            every = [lengths(part) for part in parts]
            return sum(least for least, _ in every), sum(most for _, most in every)
        case Alternatives(options):
            every = [lengths(option) for option in options]
            return min(least for least, _ in every), max(most for _, most in every)
        case Repeat(part, least, most):
            shortest, longest = lengths(part)
            return shortest * least, math.inf if most is None else longest * most
        case _:
            return 1, 1


def texts(node: Node) -> list[str] | None:
    """The texts that a tree matches, if it is a choice of texts."""
    options = node.options if isinstance(node, Alternatives) else (node,)
    found = []
    for option in options:
        parts = option.parts if isinstance(option, Sequence) else (option,)
        ranges = [part.ranges for part in parts if isinstance(part, Characters)]
        if len(ranges) < len(parts) or any(len(r) > 1 or r[0][0] < r[0][1] for r in ranges):
            return None
        found.append("".join(chr(r[0][0]) for r in ranges))
    return found


def canonical(node: Node) -> str:
    """A tree as a regular expression that every engine reads in the same way."""
    match node:
        case Sequence(parts):
            return "".join(map(canonical, parts))
        case Alternatives(options):
            return f"(?:{'|'.join(map(canonical, options))})"
        case Repeat(part, least, most):
            return f"(?:{canonical(part)}){{{least},{'' if most is None else most}}}"
        case Characters(ranges):
            return f"[{''.join(map(_spelled, ranges))}]"
        case _:
            return ""


def _spelled(characters: Range) -> str:
    first, last = (
        chr(c) if chr(c).isascii() and chr(c).isalnum() else f"\\x{{{c:x}}}" for c in characters
    )
    return first if first == last else f"{first}-{last}"
