"""Writes expressions and rules of the EBNF dialect that xgrammar reads.

An expression is a string. Every function here returns one that needs no brackets in a sequence.
A grammar that is too large or too costly raises :class:`GrammarError`.
"""

import functools
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Final

from app.llm.ebnf.errors import GrammarError

EMPTY: Final = '""'
"""The expression of the empty text."""

MAX_TEXT: Final = 150_000
"""Limit for the characters of all rules; a schema needs about as many as it has itself."""

MOST_WRITTEN_OUT: Final = 256
"""Items of an array that the library makes rules of, where more are counted."""

# Limit for the counted items of all different arrays: to compile them takes half a second.
_MAX_ITEMS = 6_000

Range = tuple[int, int]
"""Code points, both ends included."""

Ranges = tuple[Range, ...]

# xgrammar prints a grammar before it compiles it, and prints these as \xN. It would read a
# hexadecimal digit that follows in the string as part of N, so each of them is a string by itself.
_PRINTED_AS_HEX = frozenset((*range(0x20), *range(0x7F, 0x100)))
_CARET = ord("^")
# Classes of at most this many characters, such as all of ASCII, are small.
_FEW = 128
_LETTERS = [(ord(first), ord(last)) for first, last in ("az", "AZ", "  ")]
_ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def literal(text: str) -> str:
    """The expression of exactly this text."""
    parts = re.split(r"([\x00-\x1f\x7f-\xff])", text)
    return sequence(f'"{"".join(map(_escape, part))}"' for part in parts if part)


def _escape(character: str) -> str:
    code_point = character if character.isprintable() else f"\\U{ord(character):08x}"
    return _ESCAPED.get(character, code_point)


def one_of(ranges: Sequence[Range]) -> str:
    """The expression of one character of ``ranges``, which are sorted and do not touch."""
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return literal(chr(ranges[0][0]))
    # Of a range that is no product of ranges of bytes, xgrammar takes bytes that are no UTF-8.
    ranges = [piece for one in ranges for piece in _by_bytes(one)]
    # Characters printed as \xN come last, where only a backslash or the bracket follows them. A
    # caret must not come first.
    ordered = sorted(
        ranges, key=lambda r: (r[1] in _PRINTED_AS_HEX, r[0] in _PRINTED_AS_HEX, r[0] == _CARET, r)
    )
    if ordered[0][0] == _CARET:
        rest = [(_CARET + 1, ordered[0][1]), *ordered[1:]]
        return alternatives([literal("^"), one_of([r for r in rest if r[0] <= r[1]])])
    return f"[{''.join(_member(r) for r in ordered)}]"


def _by_bytes(characters: Range) -> Iterator[Range]:
    """The range in parts of which every mix of their bytes in UTF-8 is a character of the part."""
    first, last = characters
    # The largest numbers of one, two and three bytes; each byte after the first has six bits.
    ends = [end for end in (0x7F, 0x7FF, 0xFFFF) if first <= end < last]
    for bits in (6, 12, 18) if first > 0x7F and not ends else ():
        low = (1 << bits) - 1
        if first | low < last:
            ends += [first | low] if first & low else []
            ends += [(last & ~low) - 1] if ~last & low else []
    if not ends:
        yield characters
        return
    yield from _by_bytes((first, min(ends)))
    yield from _by_bytes((min(ends) + 1, last))


def _member(characters: Range) -> str:
    first, last = (
        chr(c) if chr(c).isascii() and chr(c).isalnum() else f"\\U{c:08x}" for c in characters
    )
    return first if first == last else f"{first}-{last}"


def union(ranges: Iterable[Range]) -> list[Range]:
    """The same characters in ranges that are sorted and do not touch."""
    merged: list[Range] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def complement(ranges: Iterable[Range]) -> list[Range]:
    """All other characters but surrogates, which no text contains."""
    outside: list[Range] = []
    start = 0
    # 0x110000 is the number after the last code point.
    for first, last in union([*ranges, (0xD800, 0xDFFF), (0x110000, 0x110000)]):
        if start < first:
            outside.append((start, first - 1))
        start = last + 1
    return outside


def without(ranges: Iterable[Range], others: Iterable[Range]) -> list[Range]:
    """The characters of ``ranges`` that are not of ``others``, and no surrogates."""
    return complement([*complement(ranges), *others])


def is_small(ranges: Iterable[Range]) -> bool:
    """Whether there are so few characters that those hard to write are not left out."""
    return sum(last - first + 1 for first, last in ranges) <= _FEW


def sequence(expressions: Iterable[str]) -> str:
    """The expressions, one after the other."""
    return " ".join(e for e in expressions if e != EMPTY) or EMPTY


def alternatives(expressions: Iterable[str]) -> str:
    """One of the expressions."""
    distinct = list(dict.fromkeys(expressions))
    return distinct[0] if len(distinct) == 1 else f"({' | '.join(distinct)})"


def optional(expression: str) -> str:
    """The expression, or nothing."""
    return alternatives([EMPTY, expression])


def repeat(expression: str, least: int, most: int | None) -> str:
    """The expression, ``least`` to ``most`` times; ``None`` is no limit."""
    if most == 0 or expression == EMPTY:
        return EMPTY
    if (least, most) == (1, 1):
        return expression
    group = expression if _is_atom(expression) else f"({expression})"
    if (least, most) == (0, None):
        return f"{group}*"
    if (least, most) == (1, None):
        # The library compiles a class with a star to a loop, but one with a plus to a recursion.
        return f"{group} {group}*" if group[0] == "[" else f"{group}+"
    if most is None:
        return f"{repeat(expression, least, least)} {group}*"
    return f"{group}{{{least}}}" if least == most else f"{group}{{{least},{most}}}"


def _is_atom(expression: str) -> bool:
    return expression.isidentifier() or (
        expression[0] == "[" and expression.find("]") == len(expression) - 1
    )


class Rules:
    """The rules of one grammar: their bodies by their names.

    ``budget`` limits the cost of compiling, in the unit of :func:`cost_of`.
    """

    def __init__(self, budget: float) -> None:
        self.bodies: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._written: dict[Hashable, str] = {}
        self._size = 0
        self._items = 0
        self._budget = budget

    def reserve(self) -> str:
        """A name for a rule whose body comes later, so that the body can refer to it."""
        name = f"r{len(self.bodies)}"
        self.bodies[name] = EMPTY
        return name

    def define(self, name: str, body: str) -> None:
        """Give a reserved name its body."""
        if self._size + len(body) > MAX_TEXT:
            raise GrammarError("it is too large")
        self._size += len(body)
        self.bodies[name] = body

    def name(self, body: str, items: int = 0) -> str:
        """The name of a rule with this body; equal bodies share one, and are compiled once.

        ``items`` is how many items of an array it counts.
        """
        if body not in self._names:
            counted = self._items + min(items, MOST_WRITTEN_OUT)
            if counted > _MAX_ITEMS:
                raise GrammarError("its arrays have too many items (minItems, maxItems)")
            self._items = counted
            self._names[body] = name = self.reserve()
            self.define(name, body)
        return self._names[body]

    def shared(self, body: str) -> str:
        """The name of a rule that refers to the rule with this body.

        The library copies a rule that refers to no other to each reference, and compiles each copy.
        """
        return self.name(self.name(body))

    def once(self, key: Hashable, write: Callable[[], str]) -> str:
        """What ``write`` returns; it is called once for each key, and may add rules."""
        if key not in self._written:
            self._written[key] = write()
        return self._written[key]

    def texts(self, texts: Iterable[str]) -> str:
        """The expression of one of the texts; a rule has those with a common beginning."""
        ways = []
        for _, group in groupby(sorted(set(texts)), lambda text: text[:1]):
            alike = list(group)
            # The texts are sorted, so that all begin with what the first and the last begin with.
            pairs = zip(alike[0], alike[-1], strict=False)
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(alike[0]))
            rest = EMPTY if len(alike) == 1 else self.texts(text[same:] for text in alike)
            ways.append(sequence([literal(alike[0][:same]), rest]))
        return self.name(alternatives(ways)) if len(ways) > 1 else ways[0]

    def pay(self, cost: float) -> None:
        """Take the cost of counted characters from the budget, if it suffices."""
        if cost > self._budget:
            raise GrammarError(
                "its strings have too many counted characters (minLength, maxLength, {m,n})"
            )
        self._budget -= cost

    def text(self, root: str) -> str:
        """The text of the grammar whose answers match the expression ``root``."""
        lines = [f"{name} ::= {body}" for name, body in self.bodies.items()]
        return "\n".join([f"root ::= {root}", *lines, ""])


@functools.lru_cache(maxsize=1_000)
def cost_of(ranges: Ranges) -> float:
    """Cost of compiling one counted character of ``ranges``; almost any character costs 1.

    Measured: the library looks up every token that fits, and goes on with what may follow it. All
    small letters cost a quarter of any character, twelve frequent ones an eighth; digits or a
    single character cost next to nothing.
    """
    characters = sum(last - first + 1 for first, last in ranges)
    if characters == 1:
        return 0.002
    letters = sum(
        max(0, min(last, z) - max(first, a) + 1) for first, last in ranges for a, z in _LETTERS
    )
    return min(1.0, max(0.02, (characters if characters > 12 else letters) / 104))
