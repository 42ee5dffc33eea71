"""An LRU cache with a time to live, bounded by entries and by bytes."""

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from cachetools import TTLCache

V = TypeVar("V")


class BoundedCache(Generic[V]):
    """Keeps values until they expire; the least recently used ones make room for new ones.

    Not thread-safe: the event loop owns it.

    Args:
        max_bytes: Most bytes kept, as ``size_of`` counts them. A value larger than a quarter of
            this is not kept, so that one value cannot evict all the others.
        size_of: Bytes of a value.
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
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._values: TTLCache[str, V] = TTLCache(
            maxsize=max_bytes, ttl=ttl_seconds, timer=clock, getsizeof=size_of
        )
        self._hits = 0
        self._misses = 0

    def get(self, key: str) -> V | None:
        """The value of ``key``, or ``None``; counts a hit or a miss."""
        value = self._values.get(key)
        if value is None:
            self._misses += 1
        else:
            self._hits += 1
        return value

    def put(self, key: str, value: V) -> None:
        """Keep ``value`` and evict the least recently used values to make room for it."""
        self._values.pop(key, None)
        if self._values.getsizeof(value) > self._max_bytes // 4:
            return
        self._values.expire()
        while len(self._values) >= self._max_entries:
            self._values.popitem()
        self._values[key] = value

    def __len__(self) -> int:
        """Values that have not expired."""
        self._values.expire()
        return len(self._values)

    def statistics(self) -> dict[str, int]:
        """The cache's size, bounds and look-ups since the start, for /status."""
        return {
            "entries": len(self),
            "bytes": int(self._values.currsize),
            "max_entries": self._max_entries,
            "max_bytes": self._max_bytes,
            "hits": self._hits,
            "misses": self._misses,
        }
