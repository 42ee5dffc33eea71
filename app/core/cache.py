"""LRU caches with a time to live, bounded by entries and by bytes."""

import time
from collections import defaultdict
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

    def pop(self, key: str) -> V | None:
        """Remove a value and return it; ``None`` if there is none."""
        return self._values.pop(key, None)

    def evict(self) -> None:
        """Remove the least recently used value."""
        self._values.popitem()

    def __len__(self) -> int:
        """Values that have not expired."""
        self._values.expire()
        return len(self._values)

    @property
    def size(self) -> int:
        """Bytes of the values that have not expired."""
        self._values.expire()
        return int(self._values.currsize)

    def statistics(self) -> dict[str, int]:
        """The cache's size, bounds and look-ups since the start, for /status."""
        return {
            "entries": len(self),
            "bytes": self.size,
            "max_entries": self._max_entries,
            "max_bytes": self._max_bytes,
            "hits": self._hits,
            "misses": self._misses,
        }


class SharedCache(Generic[V]):
    """A :class:`BoundedCache` for each owner, with bounds for all of them together.

    The owner that takes most makes room for new values. So no owner can evict the values of one
    that has less.

    Args:
        max_entries: Most values of all owners.
        max_bytes: Most bytes of all owners' values, of which one value may take a quarter.
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
        self._caches: defaultdict[str, BoundedCache[V]] = defaultdict(
            lambda: BoundedCache(
                max_entries=max_entries,
                max_bytes=max_bytes,
                ttl_seconds=ttl_seconds,
                size_of=size_of,
                clock=clock,
            )
        )

    def get(self, owner: str, key: str) -> V | None:
        """An owner's value, or ``None``; counts a hit or a miss."""
        return self._caches[owner].get(key)

    def put(self, owner: str, key: str, value: V) -> None:
        """Keep a value, and evict values of the owner that takes most to make room for it."""
        self._caches[owner].put(key, value)
        caches = self._caches.values()
        while sum(map(len, caches)) > self._max_entries:
            max(caches, key=len).evict()
        while sum(cache.size for cache in caches) > self._max_bytes:
            max(caches, key=lambda cache: cache.size).evict()

    def pop(self, owner: str, key: str) -> V | None:
        """Remove an owner's value and return it; ``None`` if there is none."""
        return self._caches[owner].pop(key)

    def __len__(self) -> int:
        """Values that have not expired."""
        return sum(map(len, self._caches.values()))

    def statistics(self) -> dict[str, int]:
        """The sizes and look-ups of all owners, and the bounds, for /status."""
        every = [cache.statistics() for cache in self._caches.values()]
        counts = ("entries", "bytes", "hits", "misses")
        return {
            **{name: sum(each[name] for each in every) for name in counts},
            "max_entries": self._max_entries,
            "max_bytes": self._max_bytes,
        }
