"""Which waiting request goes to the engine next.

It is one of the caller with the fewest requests in the engine; among equals, of the caller served
longest ago; within one caller, the request that came first. A caller that comes new stands
directly before the caller served last and behind all that have been waiting. See
docs/adr/0011-fair-turns-between-callers.md.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Caller(Generic[T]):
    """A caller that has requests in the engine or waiting for it.

    Attributes:
        served: When a request of it last went to the engine, counted in requests.
        in_engine: How many requests of it the engine has.
        waiting: Its other requests, oldest first.
    """

    served: float
    in_engine: int = 0
    waiting: deque[T] = field(default_factory=deque)


class FairQueue(Generic[T]):
    """Waiting requests of all callers. Forgets a caller that has none, nor one in the engine."""

    def __init__(self) -> None:
        # In the order in which they came.
        self._callers: dict[str, _Caller[T]] = {}
        self._served = 0

    def add(self, caller: str, request: T) -> None:
        """A request waits for the engine."""
        # Were a newcomer first, callers that come and go could keep another waiting for ever.
        known = self._callers.setdefault(caller, _Caller(served=self._served - 0.5))
        known.waiting.append(request)

    def take(self) -> T | None:
        """The next request, which is in the engine from now on; ``None`` where none waits."""
        waiting = [known for known in self._callers.values() if known.waiting]
        if not waiting:
            return None
        # The first of equals is the one that came first.
        known = min(waiting, key=lambda known: (known.in_engine, known.served))
        self._served += 1
        known.served = self._served
        known.in_engine += 1
        return known.waiting.popleft()

    def remove(self, caller: str, request: T) -> None:
        """A waiting request goes."""
        self._callers[caller].waiting.remove(request)
        self._forget_if_gone(caller)

    def ended(self, caller: str) -> None:
        """The engine no longer has a request of a caller."""
        self._callers[caller].in_engine -= 1
        self._forget_if_gone(caller)

    def _forget_if_gone(self, caller: str) -> None:
        known = self._callers[caller]
        if not (known.in_engine or known.waiting):
            del self._callers[caller]
