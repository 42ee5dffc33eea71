"""Expressions and rules of the EBNF dialect that xgrammar reads.

An expression is its text. Every function here returns one that can stand in a sequence as it is.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from app.llm.ebnf.errors import GrammarError

EMPTY: Final = '""'
"""The expression of the empty text."""

MAX_TEXT: Final = 100_000
"""Characters of all rules together; a schema needs about as many as it has itself."""

Range = tuple[int, int]
"""Code points, both ends included."""

LAST_CODE_POINT: Final = 0x10FFFF
# xgrammar compiles what it has printed itself, and prints these as \xN: whatever hexadecimal digit
# follows one in a string would be read as part of it. Each is a string of its own therefore.
_PRINTED_AS_HEX = frozenset((*range(0x20), *range(0x7F, 0x100)))
_CARET = ord("^")
_ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def literal(text: str) -> str:
    """Exactly this text."""
    strings: list[str] = []
    run = ""
    for character in text:
        if ord(character) in _PRINTED_AS_HEX:
            strings += [run, _escape(character)]
            run = ""
        else:
            run += _escape(character)
    strings.append(run)
    return sequence(f'"{s}"' for s in strings if s)


def _escape(character: str) -> str:
    if character in _ESCAPED:
        return _ESCAPED[character]
    return character if character.isprintable() else f"\\U{ord(character):08x}"


def one_of(ranges: Sequence[Range]) -> str:
    """Exactly one character of these ranges; they are sorted and do not touch."""
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return literal(chr(ranges[0][0]))
    # What is printed as \xN comes last, where only a backslash or the bracket follows; a caret
    # must not be printed first.
    ordered = sorted(
        ranges, key=lambda r: (r[1] in _PRINTED_AS_HEX, r[0] in _PRINTED_AS_HEX, r[0] == _CARET, r)
    )
    if ordered[0][0] == _CARET:
        rest = [(_CARET + 1, ordered[0][1]), *ordered[1:]]
        return alternatives([literal("^"), one_of([r for r in rest if r[0] <= r[1]])])
    return f"[{''.join(_member(r) for r in ordered)}]"


def _member(characters: Range) -> str:
    first, last = (_in_class(chr(code)) for code in characters)
    return first if first == last else f"{first}-{last}"


def _in_class(character: str) -> str:
    plain = character.isascii() and character.isalnum()
    return character if plain else f"\\U{ord(character):08x}"


def union(ranges: Iterable[Range]) -> list[Range]:
    """The same characters, in ranges that are sorted and do not touch."""
    merged: list[Range] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def complement(ranges: Iterable[Range]) -> list[Range]:
    """Every other character; surrogates, which no text has, are left out."""
    outside: list[Range] = []
    start = 0
    for first, last in union([*ranges, (0xD800, 0xDFFF)]):
        if start < first:
            outside.append((start, first - 1))
        start = last + 1
    return [*outside, (start, LAST_CODE_POINT)] if start <= LAST_CODE_POINT else outside


def sequence(expressions: Iterable[str]) -> str:
    """One after the other."""
    return " ".join(e for e in expressions if e != EMPTY) or EMPTY


def alternatives(expressions: Iterable[str]) -> str:
    """Any one of them."""
    distinct = list(dict.fromkeys(expressions))
    return distinct[0] if len(distinct) == 1 else f"({' | '.join(distinct)})"


def optional(expression: str) -> str:
    """It, or nothing."""
    return alternatives([EMPTY, expression])


def repeat(expression: str, least: int, most: int | None) -> str:
    """It, this often; ``None`` is no limit."""
    if most == 0 or expression == EMPTY:
        return EMPTY
    if (least, most) == (1, 1):
        return expression
    group = expression if _is_atom(expression) else f"({expression})"
    if (least, most) == (0, None):
        return f"{group}*"
    if (least, most) == (1, None):
        # The library takes a class and a star for one; its own plus makes a recursion of it.
        return f"{group} {group}*" if group[0] == "[" else f"{group}+"
    if most is None:
        return f"{repeat(expression, least, least)} {group}*"
    return f"{group}{{{least}}}" if least == most else f"{group}{{{least},{most}}}"


def _is_atom(expression: str) -> bool:
    return expression.isidentifier() or (
        expression[0] == "[" and expression.find("]") == len(expression) - 1
    )


class Rules:
    """The rules of one grammar.

    Attributes:
        is_compiled: Whether the library is to compile them.
    """

    def __init__(self, budget: float) -> None:
        """Begin.

        Args:
            budget: What compiling may cost, in the unit of :func:`cost_of`; infinite where
                nothing has to be compiled.
        """
        self.is_compiled = math.isfinite(budget)
        self._bodies: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._size = 0
        self._budget = budget

    def reserve(self) -> str:
        """A name for a rule whose body comes later, so that the body may refer to it."""
        name = f"r{len(self._bodies)}"
        self._bodies[name] = EMPTY
        return name

    def define(self, name: str, body: str) -> None:
        """Give a reserved name its body.

        Raises:
            GrammarError: The grammar has become too large.
        """
        self._size += len(body)
        if self._size > MAX_TEXT:
            raise GrammarError("it is too large")
        self._bodies[name] = body

    def name(self, body: str, cost: float = 0.0) -> str:
        """The name of a rule with this body; equal bodies share one, and are compiled once.

        Args:
            body: An expression.
            cost: See :func:`cost_of`; nothing for what costs little.

        Raises:
            GrammarError: The grammar has become too large, or too costly to compile.
        """
        if body not in self._names:
            self._budget -= cost
            if self._budget < 0:
                raise GrammarError(
                    "its strings have too many counted characters (minLength, maxLength, {m,n})"
                )
            self._names[body] = self.reserve()
            self.define(self._names[body], body)
        return self._names[body]

    def shared(self, body: str, cost: float = 0.0) -> str:
        """The same, for a rule that is not copied to where it is referred to.

        The library copies a rule that refers to no other, and compiles every copy.
        """
        return self.name(self.name(body, cost))

    def recursive(self, body: Callable[[str], str]) -> str:
        """The name of a rule whose body, given that name, refers to itself."""
        key = body("itself")
        if key not in self._names:
            self._names[key] = self.reserve()
            self.define(self._names[key], body(self._names[key]))
        return self._names[key]

    def text(self, root: str) -> str:
        """The grammar, whose answers are those of the expression ``root``."""
        lines = [f"{name} ::= {body}" for name, body in self._bodies.items()]
        return "\n".join([f"root ::= {root}", *lines, ""])


def cost_of(ranges: Sequence[Range]) -> float:
    """What compiling one place of these characters costs; 1 is a place of almost all characters.

    Measured: the library looks up every token that may stand there and goes on with whatever
    follows. A letter costs a quarter of any character, a digit and one character next to nothing.
    """
    characters = sum(last - first + 1 for first, last in ranges)
    if characters > 128:
        return 1.0
    if characters > 12:
        return characters / 104
    return 0.02 if characters > 1 else 0.002
