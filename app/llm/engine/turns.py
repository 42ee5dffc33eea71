"""Whose turn it is: places to run, handed out fairly between callers.

The next turn goes to the waiting caller with the fewest running requests; among equals, to the
one served longest ago; within one caller, in the order of arrival. See
docs/adr/0011-fair-turns-between-callers.md.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class _Caller(Generic[T]):
    """What is known of a caller that holds at least one place.

    Attributes:
        places: Places held, running and waiting ones.
        running: Turns held.
        served: When it last got a turn, on the clock of turns.
        arrival: Tells callers apart where the rest is equal; the earlier one goes first.
        waiting: Its requests that want a turn, oldest first.
    """

    __slots__ = ("arrival", "places", "running", "served", "waiting")

    def __init__(self, *, served: int, arrival: int) -> None:
        self.places = 0
        self.running = 0
        self.served = served
        self.arrival = arrival
        # A plain dict takes ever longer to find its first key when the first is always removed.
        self.waiting: OrderedDict[T, None] = OrderedDict()

    @property
    def rank(self) -> tuple[int, int, int]:
        """The waiting caller with the least is next."""
        return self.running, self.served, self.arrival


class FairTurns(Generic[T]):
    """Callers, the places they hold, and which waiting request is next.

    Every method takes O(log n) comparisons for n waiting callers. A caller without a place leaves
    no trace.
    """

    def __init__(self) -> None:
        """Nobody holds or wants anything."""
        self._callers: dict[str, _Caller[T]] = {}
        # Ranks of the callers that wait, in order. A rank holds a number of its own for each
        # caller, so the name beside it is never compared.
        self._order: list[tuple[tuple[int, int, int], str]] = []
        self._turns = 0
        self._arrivals = 0

    def places(self, caller: str) -> int:
        """How many places a caller holds."""
        known = self._callers.get(caller)
        return known.places if known else 0

    def enter(self, caller: str) -> None:
        """A caller takes a place."""
        known = self._callers.get(caller)
        if known is None:
            self._arrivals += 1
            # A newcomer goes before whoever got the last turn and behind nobody who has been
            # waiting since before it. Were it simply first, callers that come and go would
            # keep one that stays from ever being served.
            known = _Caller(served=2 * self._turns - 1, arrival=self._arrivals)
            self._callers[caller] = known
        known.places += 1

    def leave(self, caller: str) -> None:
        """A caller gives a place back; its request neither waits nor runs any more."""
        known = self._callers[caller]
        known.places -= 1
        if not known.places:
            del self._callers[caller]

    def wait(self, caller: str, item: T) -> None:
        """A request of a caller, which has entered, wants a turn."""
        known = self._callers[caller]
        known.waiting[item] = None
        if len(known.waiting) == 1:
            insort(self._order, (known.rank, caller))

    def withdraw(self, caller: str, item: T) -> None:
        """A request wants no turn any more; nothing happens where it does not wait."""
        known = self._callers[caller]
        if item in known.waiting:
            del known.waiting[item]
            if not known.waiting:
                self._remove(caller, known)

    def head(self) -> tuple[str, T] | None:
        """The request that is next, and its caller."""
        if not self._order:
            return None
        caller = self._order[0][1]
        return caller, next(iter(self._callers[caller].waiting))

    def serve(self) -> None:
        """Give the turn to :meth:`head`."""
        caller = self._order.pop(0)[1]
        known = self._callers[caller]
        known.waiting.popitem(last=False)
        self._turns += 1
        known.served = 2 * self._turns
        known.running += 1
        if known.waiting:
            insort(self._order, (known.rank, caller))

    def finish(self, caller: str) -> None:
        """A running request of a caller has ended."""
        known = self._callers[caller]
        if known.waiting:
            self._remove(caller, known)
        known.running -= 1
        if known.waiting:
            insort(self._order, (known.rank, caller))

    def _remove(self, caller: str, known: _Caller[T]) -> None:
        del self._order[bisect_left(self._order, (known.rank, caller))]
