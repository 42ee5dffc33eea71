"""Refusing early: what the engine has no place for is not even parsed.

Under an overload most requests are refused, and what a refusal costs is taken from the answers
of the others. Two thirds of it went into parsing and routing a request whose fate was known.
"""

from collections.abc import Callable

from cachetools import FIFOCache
from fastapi import Request

from app.api.idempotency import HEADER as IDEMPOTENCY_KEY


class LoadShedding:
    """Refuses requests that need a place in the engine while there is none.

    A kept answer needs no place, and is served however full the engine is. Only what was asked
    before can have one, so bodies are remembered, and only those never seen are refused here.
    """

    def __init__(self, check_room: Callable[[str], None], *, remembered: int) -> None:
        """Nothing is refused before :meth:`check`.

        Args:
            check_room: Raises the refusal of a caller's request where there is no place for it.
            remembered: Most bodies to remember, each as a number.
        """
        self._check_room = check_room
        self._seen: FIFOCache[int, None] = FIFOCache(maxsize=max(remembered, 1))

    def check(self, request: Request, body: bytes) -> None:
        """Refuse a request now, if it would be refused once it is parsed.

        Args:
            request: Its ``state.principal`` is the caller.
            body: The request's body.

        Raises:
            ServiceError: See :meth:`GenerationService.check_room`.
        """
        if IDEMPOTENCY_KEY in request.headers:
            return
        caller = request.state.principal.key_id
        # Two bodies with one hash cost the second one a refusal that comes a little later.
        asked = hash((caller, body))
        if asked not in self._seen:
            self._check_room(caller)
            self._seen[asked] = None
