"""Reads the rules that the translation writes, to see which texts they match."""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import count

_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\{\d+(?:,\d*)?\}|\w+|\S')
_LOOKAHEAD = re.compile(r' \(="[^"]*"\)$')
_COUNTS = {"*": (0, None), "+": (1, None), "?": (0, 1)}

# Where an expression can end that starts at one of some places.
_Read = Callable[[frozenset[int]], frozenset[int]]


def matches(grammar: str, text: str) -> bool:
    """Whether a grammar matches a text as a whole."""
    return len(text) in _Reader(_bodies(grammar), text).ends("root", 0)


# Tests ask the same grammar for many texts.
@lru_cache(maxsize=8)
def _bodies(grammar: str) -> Mapping[str, list[str]]:
    """The tokens of each rule."""
    rules = (line.partition(" ::= ") for line in grammar.strip().splitlines())
    return {name: _TOKEN.findall(_LOOKAHEAD.sub("", body)) for name, _, body in rules}


class _Reader:
    def __init__(self, bodies: Mapping[str, list[str]], text: str) -> None:
        self._text = text
        self._bodies = bodies
        self._rules: dict[str, _Read] = {}
        self._ends: dict[tuple[str, int], frozenset[int]] = {}

    def ends(self, name: str, start: int) -> frozenset[int]:
        """Where a rule can end that starts at a place of the text."""
        if name not in self._rules:
            self._rules[name] = self._alternatives(iter([*self._bodies[name], ")"]))
        if (name, start) not in self._ends:
            self._ends[name, start] = self._rules[name](frozenset((start,)))
        return self._ends[name, start]

    def _alternatives(self, tokens: Iterator[str]) -> _Read:
        options: list[list[_Read]] = [[]]
        for token in tokens:
            if token == ")":
                return _any(options)
            if token == "|":
                options.append([])
            elif token in _COUNTS or token[0] == "{":
                options[-1].append(_repeated(options[-1].pop(), *_counts(token)))
            else:
                options[-1].append(self._one(token, tokens))
        raise AssertionError("a bracket is open")

    def _one(self, token: str, tokens: Iterator[str]) -> _Read:
        if token == "(":
            return self._alternatives(tokens)
        if token[0] in '"[':
            return _plain(token, self._text)

        def read(at: frozenset[int]) -> frozenset[int]:
            found: set[int] = set()
            for place in at:
                found |= self.ends(token, place)
            return frozenset(found)

        return read


def _plain(token: str, text: str) -> _Read:
    if token[0] == "[":
        return lambda at: frozenset(p + 1 for p in at if re.match(token, text[p : p + 1]))
    literal = ast.literal_eval(token)
    return lambda at: frozenset(p + len(literal) for p in at if text.startswith(literal, p))


def _any(options: list[list[_Read]]) -> _Read:
    def read(at: frozenset[int]) -> frozenset[int]:
        found: set[int] = set()
        for parts in options:
            reached = at
            for part in parts:
                reached = part(reached)
            found |= reached
        return frozenset(found)

    return read


def _counts(token: str) -> tuple[int, int | None]:
    if token in _COUNTS:
        return _COUNTS[token]
    least, _, most = token.strip("{}").partition(",")
    return int(least), (int(most) if most else None) if "," in token else int(least)


def _repeated(part: _Read, least: int, most: int | None) -> _Read:
    def read(at: frozenset[int]) -> frozenset[int]:
        found: frozenset[int] = frozenset()
        for _ in range(least):
            at = part(at)
        numbers = count(least) if most is None else range(least, most + 1)
        for _ in numbers:
            at -= found
            found |= at
            if not at:
                break
            at = part(at)
        return found

    return read
