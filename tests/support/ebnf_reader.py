"""Reads the rules that the translation writes, to see which texts they match."""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache

_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\w+|\S')
_LOOKAHEAD = re.compile(r' \(="[^"]*"\)$')


def matches(grammar: str, text: str) -> bool:
    """Whether a grammar without counted repetitions matches a text as a whole."""
    bodies = {}
    for line in grammar.strip().splitlines():
        name, _, body = line.partition(" ::= ")
        bodies[name] = _TOKEN.findall(_LOOKAHEAD.sub("", body))

    @cache
    def ends(name: str, start: int) -> frozenset[int]:
        """Where a rule can end that starts at a place of the text."""
        tokens = iter([*bodies[name], ")"])
        return frozenset(alternatives((start,), tokens))

    def alternatives(starts: Iterable[int], tokens: Iterator[str]) -> set[int]:
        found: set[int] = set()
        at = set(starts)
        for token in tokens:
            if token == "|":
                found |= at
                at = set(starts)
            elif token == ")":
                return found | at
            elif token == "(":
                at = alternatives(frozenset(at), tokens)
            elif token[0] == '"':
                literal = ast.literal_eval(token)
                at = {place + len(literal) for place in at if text.startswith(literal, place)}
            elif token[0] == "[":
                at = {place + 1 for place in at if re.match(token, text[place : place + 1])}
            else:
                at = {end for place in at for end in ends(token, place)}
        raise AssertionError("a bracket is open")

    return len(text) in ends("root", 0)
