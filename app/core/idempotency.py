"""Answers kept under a key that the caller chose, so that a repeated request is served once.

The terms are those of the IETF draft "The Idempotency-Key HTTP Header Field": a key names one
request, its fingerprint tells that request from any other.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from app.core.cache import BoundedCache
from app.core.config import IdempotencySettings
from app.core.metrics import Metrics
from app.utils.errors import IdempotencyKeyInUseError, IdempotencyKeyReusedError

# What an entry takes beside its body: headers, fingerprint, and Python's own overhead.
_ENTRY_OVERHEAD_BYTES = 1024


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """A complete answer.

    Attributes:
        status: HTTP status code.
        headers: The headers that belong to the answer, not to its delivery.
        body: All of its bytes.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class _Entry:
    fingerprint: bytes
    answer: KeptAnswer

    @property
    def size(self) -> int:
        return len(self.answer.body) + _ENTRY_OVERHEAD_BYTES


class Claim:
    """The right to answer the request of a key; ends with :meth:`keep` or :meth:`release`."""

    def __init__(self, end: Callable[[KeptAnswer | None], None], *, max_body_bytes: int) -> None:
        self._end: Callable[[KeptAnswer | None], None] | None = end
        self.max_body_bytes = max_body_bytes

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return self._end is not None

    def keep(self, answer: KeptAnswer) -> None:
        """Serve ``answer`` from now on; only the first ending counts."""
        self._settle(answer)

    def release(self) -> None:
        """Forget the request, so that the key can be used again; only the first ending counts."""
        self._settle(None)

    def _settle(self, answer: KeptAnswer | None) -> None:
        end, self._end = self._end, None
        if end is not None:
            end(answer)


class IdempotencyStore:
    """What became of the requests that carried a key.

    Each caller has keys and bounds of its own: no caller sees, names or pushes out what another
    one keeps. Not safe to share between threads: the event loop owns it.
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
        self._answers: dict[str, BoundedCache[_Entry]] = {}
        self._in_progress: dict[tuple[str, str], bytes] = {}

    def claim(self, caller: str, key: str, fingerprint: bytes) -> KeptAnswer | Claim:
        """The answer of an earlier request with this key, or the right to answer this one.

        Args:
            caller: Who sent it.
            key: The caller's name for the request.
            fingerprint: Equal for equal requests only.

        Raises:
            IdempotencyKeyReusedError: The key stands for another request.
            IdempotencyKeyInUseError: The same request is being answered.
        """
        under_way = self._in_progress.get((caller, key))
        kept = self._answers[caller].get(key) if caller in self._answers else None
        known = under_way or (kept and kept.fingerprint)
        if known and known != fingerprint:
            self._count("reused")
            raise IdempotencyKeyReusedError
        if under_way:
            self._count("in_use")
            raise IdempotencyKeyInUseError
        if kept:
            self._count("replayed")
            return kept.answer
        self._count("new")
        self._in_progress[caller, key] = fingerprint

        def end(answer: KeptAnswer | None) -> None:
            del self._in_progress[caller, key]
            if answer is not None:
                self._keep(caller, key, _Entry(fingerprint, answer))

        # More than a quarter of the bytes is not kept, see BoundedCache.
        limit = self._settings.max_bytes // 4 - _ENTRY_OVERHEAD_BYTES
        return Claim(end, max_body_bytes=limit)

    def keep_only(self, callers: Collection[str]) -> None:
        """Forget the answers of all other callers, whose keys are gone."""
        for caller in self._answers.keys() - set(callers):
            del self._answers[caller]

    def _keep(self, caller: str, key: str, entry: _Entry) -> None:
        if caller not in self._answers:
            self._answers[caller] = BoundedCache(
                max_entries=self._settings.max_entries,
                max_bytes=self._settings.max_bytes,
                ttl_seconds=self._settings.ttl_seconds,
                size_of=lambda entry: entry.size,
                clock=self._clock,
            )
        self._answers[caller].put(key, entry)

    def _count(self, result: str) -> None:
        self._metrics.idempotency_requests.labels(result).inc()
