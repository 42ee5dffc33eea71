"""Answers to identical requests: kept for a while, and generated once when asked together."""

import hashlib
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from app.core.cache import BoundedCache
from app.core.config import CacheSettings
from app.core.metrics import Metrics
from app.llm.report import GenerationReport
from app.services.flights import Flight

# What an entry takes beside its text: keys, numbers, and Python's own overhead.
_ENTRY_OVERHEAD_BYTES = 1024
# A token's bytes, its number, and the objects that hold them.
_LOGPROB_BYTES = 160

Generate = Callable[[Flight], Coroutine[Any, Any, GenerationReport]]
"""Generates an answer into a flight."""


class ResponseCache:
    """Serves kept answers, joins identical requests, and keeps new answers."""

    def __init__(self, settings: CacheSettings, metrics: Metrics) -> None:
        self._enabled = settings.enabled
        self._metrics = metrics
        self._flights: dict[str, Flight] = {}
        self._cache: BoundedCache[Flight] = BoundedCache(
            max_entries=settings.size,
            max_bytes=settings.max_bytes,
            ttl_seconds=settings.ttl_seconds,
            size_of=_size,
        )
        metrics.cache_entries.set_function(lambda: len(self._cache))

    def lookup(self, caller: str, key: str | None) -> Flight | None:
        """A caller's kept answer, as a generation that has ended.

        Args:
            caller: Id of the API key.
            key: From :func:`cache_key`; ``None`` for a request that wants no cache.
        """
        if key is None or not self._enabled:
            return None
        stored = self._cache.get(key, caller)
        if stored is None:
            return None
        self._metrics.cache_requests.labels("hit").inc()
        return stored.again()

    def generate(self, caller: str, key: str | None, generate: Generate) -> Flight:
        """A new generation, or the one of the same key that is under way."""
        if key is None or not self._enabled:
            self._metrics.cache_requests.labels("bypass").inc()
            flight = Flight()
        elif joined := self._flights.get(key):
            self._metrics.cache_requests.labels("coalesced").inc()
            return joined
        else:
            self._metrics.cache_requests.labels("miss").inc()
            flight = self._flights[key] = Flight(partial(self._landed, caller, key))
        flight.start(generate(flight))
        return flight

    def _landed(self, caller: str, key: str, flight: Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if flight.report is not None:
            self._cache.put(key, flight.again(), caller)

    def statistics(self) -> dict[str, int]:
        """How the cache is doing."""
        return self._cache.statistics()


def _size(flight: Flight) -> int:
    """Bytes that a kept answer takes, roughly."""
    logprobs = sum(1 + len(entry.top) for entry in flight.logprobs)
    text = len(flight.text.encode()) + len(flight.reasoning.encode())
    return text + _LOGPROB_BYTES * logprobs + _ENTRY_OVERHEAD_BYTES


def cache_key(*parts: Any) -> str:
    """SHA-256 of everything that decides an answer, and of who asks for it."""
    # Not as MessagePack, which has no integers above 64 bits; the schema of a tool may.
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
