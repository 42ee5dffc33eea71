"""A least-recently-used cache with a lifetime, bounded by entries and by bytes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from cachetools import TTLCache

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """How a cache is doing, for /status."""

    entries: int
    bytes: int
    max_entries: int
    max_bytes: int
    hits: int
    misses: int


class BoundedCache(Generic[V]):
    """Keeps values for a time, and the recently used ones longest.

    Not safe to share between threads: the event loop owns it.
    """

    def __init__(
        self,
        *,
        max_entries: int,
        max_bytes: int,
        ttl_seconds: float,
        size_of: Callable[[V], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an empty cache.

        Args:
            max_entries: Most values kept.
            max_bytes: Most bytes kept, as ``size_of`` counts them; a value larger than a
                quarter of this is not kept at all, so that it cannot push out everything else.
            ttl_seconds: How long a value is kept.
            size_of: Bytes of a value.
            clock: Seconds, never going back.
        """
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._values: TTLCache[str, V] = TTLCache(
            maxsize=max_bytes, ttl=ttl_seconds, timer=clock, getsizeof=size_of
        )
        self._hits = 0
        self._misses = 0

    def get(self, key: str) -> V | None:
        """The value of ``key``, if it is still kept."""
        value = self._values.get(key)
        if value is None:
            self._misses += 1
        else:
            self._hits += 1
        return value

    def put(self, key: str, value: V) -> None:
        """Keep ``value``; the least recently used ones make room for it."""
        self._values.pop(key, None)
        if self._size_of(value) > self._max_bytes // 4:
            return
        self._values.expire()
        while len(self._values) >= self._max_entries:
            self._values.popitem()
        self._values[key] = value

    def __len__(self) -> int:
        """Values kept now."""
        self._values.expire()
        return len(self._values)

    def statistics(self) -> CacheStatistics:
        """How the cache is doing."""
        return CacheStatistics(
            entries=len(self),
            bytes=int(self._values.currsize),
            max_entries=self._max_entries,
            max_bytes=self._max_bytes,
            hits=self._hits,
            misses=self._misses,
        )
