"""Who runs in the engine, and which few requests it holds ready for the next free slots.

A slot becomes free inside the engine's loop. Were its next request handed over only when that is
known here, the slot would stand empty for a step: the answer's last token would have to reach this
process, and the request the engine, before the next step begins, and it has begun by then. So while
requests wait the engine holds some of them in hand, and takes them up in the order in which they
came. See docs/adr/0023-requests-in-hand.md.
"""

from collections.abc import Callable
from typing import Protocol

from app.llm.engine.departures import Departures

# One request in hand for so many slots: at least as many as usually end in a step.
_SLOTS_FOR_ONE_IN_HAND = 8


class Handed(Protocol):
    """A request that has been handed to the engine."""

    def begun(self) -> None:
        """The engine takes it up."""


class Slots:
    """Turns that have been given: slots in the engine's batch, and places in its hand.

    The engine is not asked what it does. It does it in the order of what it is sent, so that it is
    known here: a request that is handed over begins at once where a slot is free, and else when
    the slots of all before it have been freed.
    """

    def __init__(self, max_running: int, clock: Callable[[], float]) -> None:
        """Every slot is free.

        Args:
            max_running: How many slots there are.
            clock: Measures how long requests hold them.
        """
        self.departures = Departures(max_running, clock)
        self._max_running = max_running
        self._most = max_running + max_running // _SLOTS_FOR_ONE_IN_HAND
        # Those that have a turn, handed over or about to be.
        self._turns: set[Handed] = set()
        self._running: set[Handed] = set()
        # In the order in which they were handed over; the values mean nothing.
        self._in_hand: dict[Handed, None] = {}

    @property
    def running(self) -> int:
        """Slots that are taken."""
        return len(self._running)

    @property
    def has_room(self) -> bool:
        """Whether another turn can be given."""
        return len(self._turns) < self._most

    @property
    def is_empty(self) -> bool:
        """Whether no turn is held."""
        return not (self._turns or self._running or self._in_hand)

    def give_turn(self, request: Handed) -> None:
        """A request may be handed over."""
        self._turns.add(request)

    def hand_over(self, request: Handed) -> None:
        """A request that has a turn goes to the engine now."""
        self._in_hand[request] = None
        self._fill()

    def end_turn(self, request: Handed, *, served: bool) -> bool:
        """Take back a request's turn: it ended, was stopped, or was never handed over.

        Args:
            request: Whose turn it is.
            served: Whether it got its whole answer.

        Returns:
            Whether it had one.
        """
        if request not in self._turns:
            return False
        self._turns.remove(request)
        self._in_hand.pop(request, None)
        if request in self._running:
            self._running.remove(request)
            self.departures.end(request, served=served)
            self._fill()
        return True

    def _fill(self) -> None:
        while self._in_hand and len(self._running) < self._max_running:
            request = next(iter(self._in_hand))
            del self._in_hand[request]
            self._running.add(request)
            self.departures.start(request)
            request.begun()
