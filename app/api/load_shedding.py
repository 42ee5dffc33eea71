"""Refusing early: what the engine has no place for is not even parsed.

Under an overload most requests are refused, and what a refusal costs is taken from the answers
of the others. Two thirds of it went into parsing and routing a request whose fate was known.
"""

from collections.abc import Iterable

from cachetools import FIFOCache

from app.api.idempotency import HEADER as IDEMPOTENCY_KEY
from app.llm.client.client import EngineClient, EngineState

_IDEMPOTENCY_KEY = IDEMPOTENCY_KEY.lower().encode()


class LoadShedding:
    """Refuses requests that need a place in the engine while there is none.

    A kept answer needs no place, and is served however full the engine is. Only what was asked
    before can have one, so bodies are remembered, and only those never seen are refused here.
    """

    def __init__(self, engine: EngineClient, *, remembered: int) -> None:
        """Nothing is refused before :meth:`check`.

        Args:
            engine: Knows whether a caller would have a place.
            remembered: Most bodies to remember, each as a number.
        """
        self._engine = engine
        self._seen: FIFOCache[int, None] = FIFOCache(maxsize=max(remembered, 1))

    def check(self, caller: str, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """Refuse a request now, if it would be refused once it is parsed.

        Args:
            caller: Whose request it is.
            headers: The request's headers, their names in lower case.
            body: The request's body.

        Raises:
            OverloadedError: No place is free for this caller.
        """
        # Two bodies with one hash cost the second one a refusal that comes a little later.
        asked = hash((caller, body))
        if asked in self._seen:
            return
        # An engine that is not ready has time for mistakes to be told.
        if (
            self._engine.state is EngineState.READY
            and self._engine.queue.is_crowded
            and all(name != _IDEMPOTENCY_KEY for name, _ in headers)
        ):
            self._engine.check(caller)
        self._seen[asked] = None
