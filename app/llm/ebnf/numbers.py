"""Writes numbers between bounds as regular expressions of their decimal digits.

Bounds without a number between them, or with too many digits, raise :class:`GrammarError`.
"""

from dataclasses import astuple, dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from app.llm.ebnf import automaton
from app.llm.ebnf.automaton import State
from app.llm.ebnf.errors import GrammarError
from app.llm.ebnf.regex import Alternatives, Characters, Node, Repeat, Sequence
from app.llm.ebnf.writer import Ranges

# Digits of a number without a bound: a small model would not stop by itself. A 64-bit float holds
# the whole digits exactly.
_WHOLE_DIGITS = 15
_DECIMALS = 6
# Maximum number of digits of a bound, on either side of the point.
_MOST_DIGITS = 20
# Limits for the states of multiples, before and after those that are alike become one.
_MOST_STATES = 20_000
_MOST_KEPT = 300
_NONE = "there is no number between the bounds"


_EMPTY = Sequence(())
_MINUS = Characters(((ord("-"), ord("-")),))
_POINT = Characters(((ord("."), ord(".")),))


@dataclass(frozen=True)
class Bounds:
    """The bounds of a number: ``minimum`` and ``maximum`` are in the range, the others are not."""

    minimum: Decimal | None = None
    maximum: Decimal | None = None
    above: Decimal | None = None
    below: Decimal | None = None

    def __post_init__(self) -> None:
        for bound in self.given:
            if len(bound.as_tuple().digits) > _MOST_DIGITS or abs(bound.adjusted()) > _MOST_DIGITS:
                raise GrammarError(f"a bound of a number has more than {_MOST_DIGITS} digits")

    @property
    def given(self) -> list[Decimal]:
        """The bounds that are not ``None``."""
        return [bound for bound in astuple(self) if bound is not None]

    def scaled(self, decimals: int) -> tuple[int, int]:
        """The first and the last number with this many decimals, in units of the last place.

        If there is no such number, the first is larger than the last.
        """
        largest = 10 ** (_WHOLE_DIGITS + decimals) - 1
        first, last = [-largest], [largest]
        if self.minimum is not None:
            first = [_scale(self.minimum, decimals, ROUND_CEILING)]
        if self.maximum is not None:
            last = [_scale(self.maximum, decimals, ROUND_FLOOR)]
        if self.above is not None:
            first.append(_scale(self.above, decimals, ROUND_FLOOR) + 1)
        if self.below is not None:
            last.append(_scale(self.below, decimals, ROUND_CEILING) - 1)
        return max(first), min(last)


def _scale(bound: Decimal, decimals: int, rounding: str) -> int:
    return int(bound.scaleb(decimals).to_integral_value(rounding))


def integer(bounds: Bounds) -> Node:
    """The expression of a whole number."""
    return _in_range(*bounds.scaled(0), decimals=0)


def number(bounds: Bounds) -> Node:
    """The expression of a whole number or one with decimals, without an exponent."""
    if not bounds.given:
        largest = 10 ** (_WHOLE_DIGITS + _DECIMALS) - 1
        return Sequence((Repeat(_MINUS, 0, 1), _digits(0, largest, _DECIMALS)))
    places = [-int(bound.as_tuple().exponent) for bound in bounds.given]
    # With one decimal more than the bounds have, there is a number between any two of them.
    decimals = max(1, *places) + 1
    whole, fine = bounds.scaled(0), bounds.scaled(decimals)
    ranges = [(r, n) for r, n in ((whole, 0), (fine, decimals)) if r[0] <= r[1]]
    if not ranges:
        raise GrammarError(_NONE)
    return Alternatives(tuple(_in_range(*r, decimals=n) for r, n in ranges))


def multiples(states: list[State], step: Decimal) -> list[State]:
    """The automaton of the numbers of another one that are multiples of ``step``."""
    places = max(0, -int(step.normalize().as_tuple().exponent))
    if step <= 0 or max(places, step.adjusted()) > _WHOLE_DIGITS:
        raise GrammarError("multipleOf is not above 0, or has too many digits")
    unit = int(step.scaleb(places))
    # A state, the remainder of the digits so far, and the number of decimals; -1 is no point yet.
    reached = {(0, 0, -1): 0}
    found: list[State] = []
    for state, remainder, decimals in (pending := [*reached]):
        edges: list[tuple[Ranges, int]] = []
        for code, target in _characters(states[state]):
            if chr(code).isdigit():
                next_ = (
                    target,
                    (10 * remainder + code - ord("0")) % unit,
                    decimals + (decimals >= 0),
                )
            else:
                next_ = target, remainder, 0 if chr(code) == "." else decimals
            if next_[2] <= places:
                if next_ not in reached:
                    reached[next_] = len(reached)
                    pending.append(next_)
                edges.append((((code, code),), reached[next_]))
        if len(reached) > _MOST_STATES:
            raise GrammarError("multipleOf has too many digits")
        is_multiple = remainder * 10 ** (places - max(0, decimals)) % unit == 0
        found.append(State(states[state].accepts and is_multiple, tuple(edges)))
    kept = automaton.reduced(found)
    if not 0 < len(kept) <= _MOST_KEPT:
        raise GrammarError("multipleOf has too many digits" if kept else _NONE)
    return kept


def _characters(state: State) -> list[tuple[int, int]]:
    """The characters that lead on, each with the state to which it leads."""
    return [
        (code, target)
        for ranges, target in state.edges
        for first, last in ranges
        for code in range(first, last + 1)
    ]


def _in_range(first: int, last: int, *, decimals: int) -> Node:
    """Numbers from ``first`` to ``last``, in units of the last of this many decimals."""
    if first > last:
        raise GrammarError(_NONE)
    parts: list[Node] = []
    if first < 0:
        parts.append(Sequence((_MINUS, _digits(max(1, -last), -first, decimals))))
    if last >= 0:
        parts.append(_digits(max(0, first), last, decimals))
    return Alternatives(tuple(parts))


def _digits(first: int, last: int, decimals: int) -> Node:
    """Numbers from 0 up, one alternative per length; each has a digit before the point."""
    shortest = max(len(str(first)), decimals + 1)
    longest = max(len(str(last)), shortest)
    parts: list[Node] = []
    whole_lengths = []
    for length in range(shortest, longest + 1):
        low = max(first, 10 ** (length - 1) if length > decimals + 1 else 0)
        high = min(last, 10**length - 1)
        if (low, high) == (10 ** (length - 1), 10**length - 1):
            whole_lengths.append(length - decimals)
        else:
            parts.append(_between(str(low).zfill(length), str(high).zfill(length), decimals))
    if whole_lengths:
        fewest, most = whole_lengths[0] - 1, whole_lengths[-1] - 1
        more = Repeat(_digit("0", "9"), fewest, most)
        parts.append(Sequence((_digit("1", "9"), more, _fraction(decimals))))
    return Alternatives(tuple(parts))


def _between(low: str, high: str, decimals: int) -> Node:
    """Digits between two of the same length, with a point before the last ``decimals``."""
    if not low:
        return _EMPTY
    if set(low) == {"0"} and set(high) == {"9"}:
        return _any_digits(len(low), decimals)
    point = _POINT if len(low) == decimals else _EMPTY
    first, last = low[0], high[0]
    rest = len(low) - 1
    if first == last:
        tail = _between(low[1:], high[1:], decimals)
        return Sequence((point, _digit(first, first), tail))
    parts: list[Node] = []
    if low[1:].strip("0"):
        tail = _between(low[1:], "9" * rest, decimals)
        parts.append(Sequence((_digit(first, first), tail)))
        first = chr(ord(first) + 1)
    if high[1:].strip("9"):
        tail = _between("0" * rest, high[1:], decimals)
        parts.append(Sequence((_digit(last, last), tail)))
        last = chr(ord(last) - 1)
    if first <= last:
        parts.append(Sequence((_digit(first, last), _any_digits(rest, decimals))))
    return Sequence((point, Alternatives(tuple(parts))))


def _any_digits(count: int, decimals: int) -> Node:
    """This many digits; zeros at the end of the decimals may be left out."""
    if count < decimals:
        return Repeat(_digit("0", "9"), 0, count)
    whole = count - decimals
    return Sequence((Repeat(_digit("0", "9"), whole, whole), _fraction(decimals)))


def _fraction(decimals: int) -> Node:
    """The point and at most this many digits, or nothing."""
    if decimals == 0:
        return _EMPTY
    return Repeat(Sequence((_POINT, Repeat(_digit("0", "9"), 1, decimals))), 0, 1)


def _digit(first: str, last: str) -> Node:
    return Characters(((ord(first), ord(last)),))
