"""Answers kept under the caller's idempotency key, so that a repeated request is executed once.

The terms are those of the IETF draft "The Idempotency-Key HTTP Header Field".
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

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


class Claim:
    """The right to execute the request of a key; ends with :meth:`keep` or :meth:`release`.

    ``end`` is called once, with the answer to keep, or with ``None``.
    """

    def __init__(self, end: Callable[[KeptAnswer | None], None], *, max_body_bytes: int) -> None:
        self._end: Callable[[KeptAnswer | None], None] | None = end
        self.max_body_bytes = max_body_bytes

    @property
    def is_open(self) -> bool:
        """Whether neither :meth:`keep` nor :meth:`release` has been called."""
        return self._end is not None

    def keep(self, answer: KeptAnswer | None) -> None:
        """Serve ``answer`` from now on; does nothing when the claim has ended."""
        end, self._end = self._end, None
        if end is not None:
            end(answer)

    def release(self) -> None:
        """Free the key for another request; does nothing when the claim has ended."""
        self.keep(None)


class IdempotencyStore:
    """Requests in progress and kept answers by caller and idempotency key.

    Callers are isolated: no caller can read, reuse or evict another caller's answers. Not
    thread-safe: the event loop owns it.
    """

    def __init__(
        self,
        settings: IdempotencySettings,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enabled = settings.enabled
        self._settings = settings
        self._metrics = metrics
        self._clock = clock
        # The kept answers of each caller by key, with the requests' fingerprints.
        self._answers: dict[str, BoundedCache[tuple[bytes, KeptAnswer]]] = {}
        self._in_progress: dict[tuple[str, str], bytes] = {}

    def claim(self, caller: str, key: str, fingerprint: bytes) -> KeptAnswer | Claim:
        """The kept answer of this idempotency key, or the right to execute the request.

        Raises:
            IdempotencyKeyReusedError: The key belongs to another request.
            IdempotencyKeyInUseError: The same request is in progress.
        """
        under_way = self._in_progress.get((caller, key))
        kept = self._answers[caller].get(key) if caller in self._answers else None
        known = under_way or (kept and kept[0])
        if known and known != fingerprint:
            self._count("reused")
            raise IdempotencyKeyReusedError
        if under_way:
            self._count("in_use")
            raise IdempotencyKeyInUseError
        if kept:
            self._count("replayed")
            return kept[1]
        self._count("new")
        self._in_progress[caller, key] = fingerprint

        def end(answer: KeptAnswer | None) -> None:
            del self._in_progress[caller, key]
            if answer is not None:
                self._keep(caller, key, fingerprint, answer)

        # BoundedCache keeps no value larger than a quarter of its bytes.
        limit = self._settings.max_bytes // 4 - _ENTRY_OVERHEAD_BYTES
        return Claim(end, max_body_bytes=limit)

    def keep_only(self, callers: Collection[str]) -> None:
        """Drop the answers of all other callers, whose API keys were revoked."""
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

    def _count(self, result: str) -> None:
        self._metrics.idempotency_requests.labels(result).inc()
