"""Writes JSON strings as expressions: by length, by pattern or by format.

A length or a pattern that cannot be enforced raises :class:`GrammarError`.
"""

import json
import math
from functools import partial
from typing import Final

from app.llm.ebnf import automaton, regex, writer
from app.llm.ebnf.automaton import State
from app.llm.ebnf.errors import GrammarError
from app.llm.ebnf.regex import Alternatives, Characters, Node, Repeat, Sequence
from app.llm.ebnf.writer import EMPTY, Range, Ranges, Rules, alternatives, literal, one_of, sequence

# Limit for minLength and maxLength; no answer is longer.
_MAX_LENGTH = 10_000
# Longer strings are counted in blocks, so that their length costs nothing to compile. A token
# that crosses the end of a block takes up to 40 ms more with a vocabulary of 49,152, and others
# less: in an answer 14 ms on average, where a step of the bundled model takes 42.
_IN_ONE_GO = 64
_BLOCK = 32
_EACH_LENGTH = 3

_QUOTE = literal('"')
_MUST_BE_ESCAPED: list[Range] = [(0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C)]
_PLAIN = Characters(tuple(writer.complement(_MUST_BE_ESCAPED)))
_SHORT_ESCAPES = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
# \uXXXX is left out: a small model writes half characters with it, and nothing else needs it.
_ESCAPABLE = Characters(tuple((ord(c), ord(c)) for c in sorted('"\\/bfnrt')))
_ESCAPE = Sequence((Characters(((0x5C, 0x5C),)), _ESCAPABLE))
_OPEN_END = Repeat(Alternatives((_PLAIN, _ESCAPE)), 0, None)

_YEAR = "(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_DATE = "|".join(
    f"{_YEAR}-{month_and_day}"
    for month_and_day in (
        "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])",
        "(0[469]|11)-(0[1-9]|[12][0-9]|30)",
        "02-(0[1-9]|1[0-9]|2[0-8])",
    )
)
_HOUR = "([01][0-9]|2[0-3])"
_TIME = rf"{_HOUR}:[0-5][0-9]:[0-5][0-9](\.[0-9]{{1,6}})?(Z|[+-]{_HOUR}:[0-5][0-9])"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,14}[A-Za-z0-9])?"
_HOST = r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*(\.[A-Za-z0-9]+(-[A-Za-z0-9]+)*)*"
_BASE64 = "([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
FORMATS: Final = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"({_DATE})T{_TIME}",
    "duration": "P([0-9]{1,4}W|[0-9]{1,4}D(T[0-9]{1,4}[HMS])?|T[0-9]{1,4}[HMS])",
    "email": rf"[A-Za-z0-9_]+([.+-][A-Za-z0-9_]+)*@({_HOST}\.)[A-Za-z]{{2,12}}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,3}}",
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "ipv6": "([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
    "byte": _BASE64,
    "base64": _BASE64,
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "uri": rf"https?://{_HOST}(:[0-9]{{1,4}})?(/[A-Za-z0-9._~-]*)*(\?[A-Za-z0-9._~=&-]*)?",
}
"""Supported formats as regular expressions; some leave out rare spellings."""


def plain(rules: Rules, least: int, most: int | None) -> str:
    """A string of ``least`` to ``most`` characters."""
    if max(least, most or 0) > _MAX_LENGTH:
        raise GrammarError(f"minLength or maxLength is above {_MAX_LENGTH}")
    if most is not None and least > most:
        raise GrammarError("minLength is above maxLength")
    if not least and most is None:
        return rules.once(_OPEN_END, lambda: rules.shared(f"{_QUOTE} {_to_the_end(rules)}"))
    return sequence([_QUOTE, counted(rules, least, most, _QUOTE)])


def counted(rules: Rules, least: int, most: int | None, end: str, without: str = "") -> str:
    """So many characters and what ends them.

    The characters are a JSON string's, or any but the one in ``without``, and then there is a most.
    """
    if most is None:
        rest = rules.once(_QUOTE, partial(_to_the_end, rules))
    else:
        more = most - least
        rest = rules.once((end, more), partial(_at_most, rules, more, end, without))
    blocks = [_counted(rules, _BLOCK, EMPTY, without) for _ in range(least // _BLOCK)]
    return sequence([*blocks, _counted(rules, least % _BLOCK, EMPTY, without), rest])


def _to_the_end(rules: Rules) -> str:
    """Any characters of a JSON string, with the closing quote."""
    states = automaton.of_expression(_OPEN_END)
    return automaton.as_rules(states, rules, characters=one_of, end=_QUOTE)


def _at_most(rules: Rules, most: int, end: str, without: str) -> str:
    """At most this many characters, with what ends them."""
    if most <= _IN_ONE_GO:
        return _counted(rules, most, end, without)
    # A token that may end many of these at once takes long, so there cannot be many.
    rules.pay(_EACH_LENGTH)
    blocks, left = divmod(most, _BLOCK)
    rest, fewer = (_counted(rules, count, end, without) for count in (left, _BLOCK - 1))
    whole = _counted(rules, _BLOCK, EMPTY, without)
    for _ in range(blocks):
        rest = rules.name(alternatives([fewer, sequence([whole, rest])]))
    return rest


def _counted(rules: Rules, count: int, end: str, without: str) -> str:
    """So many characters, or fewer where the end comes; all counts share their rules."""
    rest = end
    for number in range(1, count + 1):
        key = (_one_more, end, without, number)
        rest = rules.once(key, partial(_one_more, rules, rest, end, without))
    return rest


def _one_more(rules: Rules, rest: str, end: str, without: str) -> str:
    rules.pay(1)
    ways = [] if end == EMPTY else [end]
    return rules.name(alternatives([*ways, *_before(rest, without)]))


def _before(rest: str, without: str) -> list[str]:
    """The ways to write one character, and then the rest."""
    if without:
        others = writer.complement([(ord(without), ord(without))])
        return [sequence([one_of(others), rest])]
    escape = sequence([literal("\\"), one_of(_ESCAPABLE.ranges)])
    return [sequence([character, rest]) for character in (one_of(_PLAIN.ranges), escape)]


def matching(rules: Rules, node: Node, least: int, most: int | None) -> str:
    """A string that matches a parsed regular expression, of ``least`` to ``most`` characters."""
    check_lengths(node, least, most)
    return rules.once(node, lambda: _written(rules, automaton.of_expression(node, _spelled)))


def check_lengths(node: Node, least: int, most: int | None) -> None:
    """Reject lengths that some match of a regular expression does not have."""
    shortest, longest = regex.lengths(node)
    if shortest < least or longest > (math.inf if most is None else most):
        raise GrammarError(
            "minLength and maxLength beside pattern or format are only supported where every "
            "match has such a length"
        )


def _written(rules: Rules, states: list[State]) -> str:
    rules.pay(automaton.cost(states))
    text = automaton.as_rules(states, rules, characters=_in_string, end=_QUOTE)
    return rules.shared(sequence([_QUOTE, text]))


def _spelled(ranges: Ranges) -> Ranges:
    """The characters of these ranges that a string can contain.

    Those that need an escape are left out of large classes.
    """
    escapes = [(ord(c), ord(c)) for c in _SHORT_ESCAPES] if writer.is_small(ranges) else []
    found = tuple(writer.without(ranges, writer.without(_MUST_BE_ESCAPED, escapes)))
    if not found:
        raise GrammarError("a regular expression wants a control character")
    return found


def _in_string(ranges: Ranges) -> str:
    """One character of these ranges as a JSON string spells it."""
    plain_ranges = writer.without(ranges, _MUST_BE_ESCAPED)
    found = [one_of(plain_ranges)] if plain_ranges else []
    for character, escape in _SHORT_ESCAPES.items():
        if any(first <= ord(character) <= last for first, last in ranges):
            found.append(literal(f"\\{escape}"))
    return alternatives(found)


def as_written(value: object) -> str:
    """The JSON text of a value."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError as error:
        raise GrammarError("a value in it is not JSON") from error
    return text
