"""Makes a parsed regular expression deterministic, and writes it as rules.

xgrammar follows all the ways at once in which a text can match, and an expression such as
``(([a-z]{0,20}){0,20})0`` has thousands. A deterministic automaton has one, so its states bound
what a token costs. As a rule for each state it is also as quick to compile as any other form.
"""

import functools
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from app.llm.ebnf import writer
from app.llm.ebnf.errors import GrammarError
from app.llm.ebnf.regex import Alternatives, Characters, Node, Repeat, Sequence
from app.llm.ebnf.writer import EMPTY, Range, Ranges, Rules, alternatives, sequence

NOTHING_FOLLOWS: Final = ' (="\\U00000001")'
"""A lookahead, after a rule's body, for what ends an answer.

The library would otherwise check every token against the end of such a rule at run time.
"""

# Parts of an expression with its repetitions written out.
_MAX_PARTS = 10_000
# Pairs of a position and a class of characters that may come there, over all states. The largest
# automaton takes a tenth of a second; `.*a.{20}` would have a million states.
_MAX_WORK = 100_000
# Cost of a deterministic automaton that need not be compared with another one.
_CHEAP = 5.0
# Limits where several ways are followed. Assumed are the least cost of a position, the length of a
# token, and which share of characters are of a class of few; rarer ways are left out.
_MAX_POSITIONS = 150
_MAX_COST = 150.0
_LEAST = 0.2
_TOKEN_LENGTH = 10
_NARROW = 0.1
_RARE = 0.01
# A set of positions is a whole number with their bits; this bit is the end of the text.
_END = 1


@dataclass(frozen=True)
class State:
    """A state, with the indices of the states to which characters lead.

    ``cost`` is that of compiling it, in the unit of :func:`writer.cost_of`.
    """

    accepts: bool
    edges: tuple[tuple[Ranges, int], ...]
    cost: float = 0.0


def of_expression(node: Node, spelled: Callable[[Ranges], Ranges] = lambda r: r) -> list[State]:
    """The states of an automaton for an expression; the first is the start.

    It is deterministic, unless it would be too large and the ways to match are few. ``spelled``
    chooses the characters of a class that may occur.

    Raises:
        GrammarError: The automaton is too large.
    """
    positions = _Positions(spelled)
    start = positions.closed(positions.before(node, _END))
    one_way = _one_way(positions, start)
    if one_way is not None and cost(one_way) < _CHEAP:
        return one_way
    found = [states for states in (one_way, _few_ways(positions, start)) if states is not None]
    if not found:
        raise GrammarError("a regular expression matches in too many ways")
    return min(found, key=cost)


def cost(states: list[State]) -> float:
    """The cost of compiling an automaton."""
    return sum(state.cost for state in states)


def _cost_of(edges: Iterable[tuple[Ranges, int]]) -> float:
    ranges = tuple(writer.union(r for ranges, _ in edges for r in ranges))
    return writer.cost_of(ranges) if ranges else 0.0


def _one_way(positions: "_Positions", start: int) -> list[State] | None:
    """The deterministic automaton, whose states are sets of positions; ``None``: too large."""
    classes = _Classes(positions.ranges)
    # Where any text may follow, nothing else matters.
    every = {c for ranges in positions.ranges for c in classes.of(ranges)}
    anything = sum(
        1 << p
        for p, follow in enumerate(positions.follow)
        if len(every) == len(classes.of(positions.ranges[p]))
        and positions.closed(follow) & (1 << p | _END) == 1 << p | _END
    )
    work = 0
    indices = {start: 0}
    pending = [start]
    states = []
    for state in pending:
        targets: dict[int, int] = {}
        for position in _bits(state & ~_END):
            for c in classes.of(positions.ranges[position]):
                targets[c] = targets.get(c, 0) | positions.follow[position]
                work += 1
            if work > _MAX_WORK:
                return None
        ways = []
        for c, follow in targets.items():
            target = positions.closed(follow)
            if target & _END and target & anything:
                target &= anything | _END
            if target not in indices:
                indices[target] = len(indices)
                pending.append(target)
            ways.append(((classes.ranges[c],), indices[target]))
        edges = _by_target(tuple(ways))
        states.append(State(bool(state & _END), edges, _cost_of(edges)))
    return _merged(states)


def _few_ways(positions: "_Positions", start: int) -> list[State] | None:
    """The automaton whose states are positions; ``None``: too large, or the ways are too many."""
    if len(positions.follow) > _MAX_POSITIONS:
        return None
    followers = [_bits(positions.closed(f)) for f in positions.follow]
    weights = [1.0 if rs and writer.cost_of(rs) > 0.1 else _NARROW for rs in positions.ranges]

    def ways(first: list[int]) -> float:
        """How many ways are followed at once, on average over the characters of a token."""
        total = 0.0
        live = dict.fromkeys(first, 1.0)
        for _ in range(_TOKEN_LENGTH):
            total += sum(live.values())
            after: dict[int, float] = {}
            for position, share in live.items():
                if (reached := share * weights[position]) > _RARE:
                    for p in followers[position]:
                        after[p] = min(1.0, after.get(p, 0.0) + reached)
            live = after
        return max(1.0, total / _TOKEN_LENGTH)

    states = []
    spent = 0.0
    # The end of the text is no position, and its place is that of the start.
    for next_ in [_bits(positions.closed(start)), *followers[1:]]:
        edges = tuple((positions.ranges[p], p) for p in next_ if p)
        states.append(State(0 in next_, edges, max(_LEAST, _cost_of(edges)) * ways(next_)))
        spent += states[-1].cost
        if spent > _MAX_COST:
            return None
    return states


def _merged(states: list[State]) -> list[State]:
    """The automaton without states from which the same texts follow, as far as that is simple."""
    while True:
        same: dict[tuple[bool, frozenset[tuple[Ranges, int]]], int] = {}
        merged = [0] * len(states)
        for at in reversed(range(len(states))):
            # Most ways lead to later states, which are merged already. Others keep their number.
            ways = [
                (rs, merged[to] if to > at else -1 if to == at else -2 - to)
                for rs, to in states[at].edges
            ]
            key = (states[at].accepts, frozenset(_by_target(tuple(ways))))
            merged[at] = same.setdefault(key, len(same))
        if len(same) == len(states):
            return states
        order: dict[int, int] = {}
        kept = [s for at, s in enumerate(states) if order.setdefault(merged[at], at) == at]
        number = {c: i for i, c in enumerate(order)}
        states = [
            replace(s, edges=_by_target(tuple((rs, number[merged[to]]) for rs, to in s.edges)))
            for s in kept
        ]


def reduced(states: list[State]) -> list[State]:
    """The automaton without states from which no text can end; empty if none can."""
    ending = {at for at, state in enumerate(states) if state.accepts}
    size = 0
    while size < len(ending):
        size = len(ending)
        ending |= {at for at, s in enumerate(states) if any(to in ending for _, to in s.edges)}
    if 0 not in ending:
        return []
    number = {at: i for i, at in enumerate(sorted(ending))}
    kept = [states[at] for at in number]
    return _merged(
        [
            replace(
                s, edges=_by_target(tuple((r, number[to]) for r, to in s.edges if to in number))
            )
            for s in kept
        ]
    )


def _by_target(edges: tuple[tuple[Ranges, int], ...]) -> tuple[tuple[Ranges, int], ...]:
    """The edges, one for each target."""
    if len({target for _, target in edges}) == len(edges):
        return edges
    found: dict[int, list[Range]] = {}
    for ranges, target in edges:
        found.setdefault(target, []).extend(ranges)
    return tuple((tuple(writer.union(ranges)), target) for target, ranges in found.items())


class _Positions:
    """The characters of an expression with repetitions written out, and what may follow each.

    A loop is a position without characters, in whose place its followers come.
    """

    def __init__(self, spelled: Callable[[Ranges], Ranges]) -> None:
        self.ranges: list[Ranges] = [()]
        self.follow = [0]
        self._spelled = spelled
        self._loops = 0
        self._parts = 0

    def before(self, node: Node, after: int) -> int:
        """The positions that may come first in ``node``, where ``after`` may come after it."""
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise GrammarError("a regular expression repeats too much")
        match node:
            case Sequence(parts):
                return functools.reduce(lambda next_, p: self.before(p, next_), parts[::-1], after)
            case Alternatives(options):
                return functools.reduce(lambda sum_, o: sum_ | self.before(o, after), options, 0)
            case Repeat(part, least, most):
                first = self._loop(part, after) if most is None else after
                for _ in range((most or least) - least):
                    first = self.before(part, first) | after
                for _ in range(least):
                    first = self.before(part, first)
                return first
            case Characters(ranges):
                return self._add(self._spelled(ranges), after)
        raise GrammarError("a regular expression has an anchor inside")

    def _loop(self, part: Node, after: int) -> int:
        loop = self._add((), after)
        self._loops |= loop
        self.follow[loop.bit_length() - 1] |= self.before(part, loop)
        return loop

    def _add(self, ranges: Ranges, after: int) -> int:
        self.ranges.append(ranges)
        self.follow.append(after)
        return 1 << (len(self.follow) - 1)

    def closed(self, positions: int) -> int:
        """The positions with those that come in the place of loops."""
        seen = 0
        while loops := positions & self._loops & ~seen:
            seen |= loops
            for loop in _bits(loops):
                positions |= self.follow[loop]
        return positions & ~self._loops


class _Classes:
    """The largest classes of characters that no range divides."""

    def __init__(self, ranges: list[Ranges]) -> None:
        self._cuts = sorted({cut for rs in ranges for a, b in rs for cut in (a, b + 1)})
        self.ranges = [(a, b - 1) for a, b in pairwise(self._cuts)]
        self._of: dict[Ranges, list[int]] = {}

    def of(self, ranges: Ranges) -> list[int]:
        """The indices of the classes in some ranges."""
        if ranges not in self._of:
            ends = ((bisect_left(self._cuts, a), bisect_left(self._cuts, b + 1)) for a, b in ranges)
            self._of[ranges] = [c for first, last in ends for c in range(first, last)]
        return self._of[ranges]


def _bits(positions: int) -> list[int]:
    found = []
    while positions:
        found.append((positions & -positions).bit_length() - 1)
        positions &= positions - 1
    return found


def as_rules(
    states: list[State],
    rules: Rules,
    *,
    characters: Callable[[Ranges], str] = writer.one_of,
    end: str = EMPTY,
    lookahead: str = "",
) -> str:
    """The expression of an automaton, whose states become rules.

    ``characters`` writes one character of some ranges, ``end`` ends each text, and ``lookahead``
    comes after the body of each rule.
    """
    into = Counter(target for state in states for _, target in state.edges)
    # A state with one way in and one way on is a part of another state's rule.
    inside = {
        i
        for i, state in enumerate(states)
        if len(state.edges) + state.accepts == 1 and (into[i] == (i > 0) or not state.edges)
    }
    names = {i: rules.reserve() for i in range(len(states)) if i not in inside}

    def way(index: int, *first: Ranges) -> str:
        parts = list(first)
        while index in inside and states[index].edges:
            ((ranges, index),) = states[index].edges
            parts.append(ranges)
        return sequence([*map(characters, parts), names.get(index, end)])

    for index, name in names.items():
        ways = [end] if states[index].accepts else []
        ways += [way(target, ranges) for ranges, target in states[index].edges]
        rules.define(name, alternatives(ways) + lookahead)
    return way(0)
