"""An LRU cache with a time to live, bounded by entries and by bytes, that several owners share."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Generic, TypeVar

from cachetools import TTLCache

V = TypeVar("V")


class BoundedCache(Generic[V]):
    """Keeps values until they expire; the least recently used ones make room for new ones.

    The owner that takes most makes room. So no owner can evict the values of one that has less.
    Not thread-safe: the event loop owns it.

    Args:
        max_entries: Most values kept, of all owners.
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
        self._size_of = size_of
        self._values: defaultdict[str, TTLCache[str, V]] = defaultdict(
            lambda: TTLCache(maxsize=max_bytes, ttl=ttl_seconds, timer=clock, getsizeof=size_of)
        )
        self._hits = 0
        self._misses = 0

    def get(self, key: str, owner: str = "") -> V | None:
        """An owner's value, or ``None``; counts a hit or a miss."""
        value = self._values[owner].get(key)
        if value is None:
            self._misses += 1
        else:
            self._hits += 1
        return value

    def put(self, key: str, value: V, owner: str = "") -> None:
        """Keep ``value``, and evict the least recently used values to make room for it."""
        size, own = self._size_of(value), self._values[owner]
        own.pop(key, None)
        if size > self._max_bytes // 4:
            return
        # Among equals it is the owner of the new value that makes room.
        while len(self) >= self._max_entries:
            max(self._values.values(), key=lambda values: (len(values), values is own)).popitem()
        while self._bytes() + size > self._max_bytes:
            max(self._values.values(), key=lambda v: (v.currsize, v is own)).popitem()
        own[key] = value

    def pop(self, key: str, owner: str = "") -> V | None:
        """Remove an owner's value and return it; ``None`` if there is none."""
        return self._values[owner].pop(key, None)

    def __len__(self) -> int:
        """Values that have not expired."""
        for values in self._values.values():
            values.expire()
        return sum(map(len, self._values.values()))

    def _bytes(self) -> int:
        return sum(int(values.currsize) for values in self._values.values())

    def statistics(self) -> dict[str, int]:
        """The cache's size, bounds and look-ups since the start, for /status."""
        return {
            "entries": len(self),
            "bytes": self._bytes(),
            "max_entries": self._max_entries,
            "max_bytes": self._max_bytes,
            "hits": self._hits,
            "misses": self._misses,
        }
