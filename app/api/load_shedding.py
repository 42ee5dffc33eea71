"""Load shedding: a request that the engine has no place for is rejected before it is parsed.

Under an overload most requests are rejected, and the processor time of a rejection is taken from
the answers to the others.
"""

from collections.abc import Mapping

from cachetools import FIFOCache

from app.api.idempotency import HEADER as IDEMPOTENCY_KEY
from app.llm.client.client import EngineClient, EngineState


class LoadShedding:
    """Rejects requests that need a place in the engine while there is none.

    A cached answer needs no place. Only a request that was sent before can have one, so the hashes
    of bodies are remembered, and only bodies that are new are rejected here.

    Args:
        engine: Knows whether a caller would get a place.
        remembered: Most bodies to remember.
    """

    def __init__(self, engine: EngineClient, *, remembered: int) -> None:
        self._engine = engine
        self._seen: FIFOCache[int, None] = FIFOCache(maxsize=max(remembered, 1))

    def check(self, caller: str, headers: Mapping[str, str], body: bytes) -> None:
        """Reject a request now if it would be rejected once it is parsed.

        Args:
            caller: The id of the caller's key.
            headers: The request's headers; the case of a name does not matter.
            body: The request's body.

        Raises:
            OverloadedError: No place is free for this caller.
        """
        # When two bodies share a hash, admission rejects the second one a little later.
        asked = hash((caller, body))
        if asked in self._seen:
            return
        # While the engine is not ready, a mistake in the body is reported first.
        if self._engine.state is EngineState.READY and IDEMPOTENCY_KEY not in headers:
            self._engine.check(caller)
        self._seen[asked] = None
