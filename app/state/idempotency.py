"""Answers kept under the caller's idempotency key, so that a repeated request is executed once.

The terms are those of the IETF draft "The Idempotency-Key HTTP Header Field".
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Literal

from app.core.cache import BoundedCache
from app.core.config import IdempotencySettings
from app.core.metrics import Metrics
from app.utils.errors import IdempotencyKeyInUseError, IdempotencyKeyReusedError

# Memory of an entry without its body: headers, fingerprint and Python's overhead.
_ENTRY_OVERHEAD_BYTES = 1024


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """A complete answer, with the headers that describe it, without those of the connection."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


End = Callable[[KeptAnswer | None], Awaitable[None]]
"""Ends a claim with the answer to keep, or with ``None``; never raises."""


class Claim:
    """The right to execute the request of a key; ends with :meth:`keep` or :meth:`release`.

    ``end`` is called once.
    """

    def __init__(self, end: End, *, max_body_bytes: int) -> None:
        self._end: End | None = end
        self.max_body_bytes = max_body_bytes

    @property
    def is_open(self) -> bool:
        """Whether neither :meth:`keep` nor :meth:`release` has been called."""
        return self._end is not None

    async def keep(self, answer: KeptAnswer | None) -> None:
        """Serve ``answer`` from now on; does nothing when the claim has ended."""
        end, self._end = self._end, None
        if end is not None:
            await end(answer)

    async def release(self) -> None:
        """Free the key for another request; does nothing when the claim has ended."""
        await self.keep(None)


Taken = KeptAnswer | End | Literal["reused", "in_use"]
"""What becomes of a request: an answer, the right to execute it, or why it is refused."""


class IdempotencyStore(ABC):
    """Requests in progress and kept answers by caller and idempotency key.

    Callers are isolated: no caller can read, reuse or evict another caller's answers.
    """

    def __init__(self, settings: IdempotencySettings, metrics: Metrics) -> None:
        self.enabled = settings.enabled
        self._settings = settings
        self._metrics = metrics

    async def claim(self, caller: str, key: str, fingerprint: bytes) -> KeptAnswer | Claim:
        """The kept answer of this idempotency key, or the right to execute the request.

        Raises:
            IdempotencyKeyReusedError: The key belongs to another request.
            IdempotencyKeyInUseError: The same request is in progress.
            StateUnavailableError: Which of these holds cannot be found out.
        """
        taken = await self._take(caller, key, fingerprint)
        if isinstance(taken, str):
            self._metrics.idempotency_requests.labels(taken).inc()
            raise IdempotencyKeyReusedError if taken == "reused" else IdempotencyKeyInUseError
        if isinstance(taken, KeptAnswer):
            self._metrics.idempotency_requests.labels("replayed").inc()
            return taken
        self._metrics.idempotency_requests.labels("new").inc()
        # BoundedCache keeps no value larger than a quarter of its bytes.
        limit = self._settings.max_bytes // 4 - _ENTRY_OVERHEAD_BYTES
        return Claim(taken, max_body_bytes=limit)

    @abstractmethod
    async def _take(self, caller: str, key: str, fingerprint: bytes) -> Taken:
        """Look a key up, and take it if it is free, in one step."""

    @abstractmethod
    def keep_only(self, callers: Collection[str]) -> None:
        """Drop the answers of all other callers, whose API keys were revoked, to free memory."""


class MemoryIdempotency(IdempotencyStore):
    """In this process. Not thread-safe: the event loop owns it."""

    def __init__(
        self,
        settings: IdempotencySettings,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(settings, metrics)
        self._clock = clock
        # The kept answers of each caller by key, with the requests' fingerprints.
        self._answers: dict[str, BoundedCache[tuple[bytes, KeptAnswer]]] = {}
        self._in_progress: dict[tuple[str, str], bytes] = {}

    async def _take(self, caller: str, key: str, fingerprint: bytes) -> Taken:
        under_way = self._in_progress.get((caller, key))
        kept = self._answers[caller].get(key) if caller in self._answers else None
        known = under_way or (kept and kept[0])
        if known and known != fingerprint:
            return "reused"
        if under_way:
            return "in_use"
        if kept:
            return kept[1]
        self._in_progress[caller, key] = fingerprint

        async def end(answer: KeptAnswer | None) -> None:
            del self._in_progress[caller, key]
            if answer is not None:
                self._keep(caller, key, fingerprint, answer)

        return end

    def keep_only(self, callers: Collection[str]) -> None:
        """See :class:`IdempotencyStore`."""
        for caller in self._answers.keys() - set(callers):
            del self._answers[caller]

    def _keep(self, caller: str, key: str, fingerprint: bytes, answer: KeptAnswer) -> None:
        if caller not in self._answers:
            self._answers[caller] = BoundedCache(
                max_entries=self._settings.max_entries,
                max_bytes=self._settings.max_bytes,
                ttl_seconds=self._settings.ttl_seconds,
                size_of=lambda kept: len(kept[1].body) + _ENTRY_OVERHEAD_BYTES,
                clock=self._clock,
            )
        self._answers[caller].put(key, (fingerprint, answer))
