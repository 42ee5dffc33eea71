"""The bounded cache: lifetime, number, bytes and eviction."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.cache import BoundedCache


@dataclass
class Clock:
    """A clock that the test sets."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock at 0."""
    return Clock()


@pytest.fixture
def cache(clock: Clock) -> BoundedCache[str]:
    """A cache for three values, 100 bytes and ten seconds."""
    return new_cache(clock)


def new_cache(clock: Clock) -> BoundedCache[str]:
    """A cache for three values, 100 bytes and ten seconds."""
    return BoundedCache(max_entries=3, max_bytes=100, ttl_seconds=10, size_of=len, clock=clock)


def test_a_value_is_kept_for_its_time(cache: BoundedCache[str], clock: Clock) -> None:
    """A value is found until its time to live has passed, and not at that moment."""
    cache.put("a", "x")
    clock.now = 9.999
    assert cache.get("a") == "x"
    clock.now = 10
    assert cache.get("a") is None
    assert len(cache) == 0
    assert cache.statistics()["bytes"] == 0


def test_being_used_does_not_prolong_a_value(cache: BoundedCache[str], clock: Clock) -> None:
    """Reading a value does not extend its time to live."""
    cache.put("a", "x")
    clock.now = 9
    cache.get("a")
    clock.now = 11
    assert cache.get("a") is None


def test_the_least_recently_used_goes_first(cache: BoundedCache[str]) -> None:
    """A full cache evicts the least recently used value."""
    for key in ("a", "b", "c"):
        cache.put(key, key)
    cache.get("a")
    cache.put("d", "d")
    assert [cache.get(key) for key in ("a", "b", "c", "d")] == ["a", None, "c", "d"]


def test_bytes_are_bounded_by_eviction() -> None:
    """Values are evicted until the new one fits into max_bytes."""
    wide: BoundedCache[str] = BoundedCache(
        max_entries=100, max_bytes=100, ttl_seconds=10, size_of=len
    )
    for key in "abcde":
        wide.put(key, key * 25)
    assert [wide.get(key) is None for key in "abcde"] == [True, False, False, False, False]
    assert wide.statistics()["bytes"] == 100


def test_a_value_too_large_is_not_kept(cache: BoundedCache[str]) -> None:
    """A value larger than a quarter of max_bytes is not kept and evicts nothing."""
    cache.put("a", "x" * 25)
    cache.put("b", "x" * 26)
    assert cache.get("a") is not None
    assert cache.get("b") is None


def test_putting_again_replaces(cache: BoundedCache[str], clock: Clock) -> None:
    """Putting a key again replaces its value and restarts its time to live."""
    cache.put("a", "old")
    clock.now = 6
    cache.put("a", "new")
    assert (cache.get("a"), len(cache), cache.statistics()["bytes"]) == ("new", 1, 3)
    clock.now = 12
    assert cache.get("a") == "new"


def test_statistics_count_hits_and_misses(cache: BoundedCache[str]) -> None:
    """Statistics count hits and misses and show the bounds."""
    cache.put("a", "xyz")
    for key in ("a", "a", "b"):
        cache.get(key)
    statistics = cache.statistics()
    assert (statistics["hits"], statistics["misses"]) == (2, 1)
    assert (statistics["entries"], statistics["bytes"]) == (1, 3)
    assert (statistics["max_entries"], statistics["max_bytes"]) == (3, 100)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 40), st.floats(0, 6))))
def test_the_bounds_always_hold(steps: list[tuple[str, int, float]]) -> None:
    """Number, bytes and age stay within their bounds after any sequence of puts and pauses."""
    clock = Clock()
    cache = new_cache(clock)
    made: dict[str, float] = {}
    for key, size, pause in steps:
        clock.now += pause
        cache.put(key, "x" * size)
        if size <= 25:
            made[key] = clock.now
            assert cache.get(key) == "x" * size
        statistics = cache.statistics()
        assert statistics["entries"] == len(cache) <= 3
        assert statistics["bytes"] <= 100
        for other, at in made.items():
            if cache.get(other) is not None:
                assert clock.now - at < 10


def new_shared(clock: Clock, max_entries: int = 10) -> BoundedCache[str]:
    """A cache for 100 bytes and ten seconds."""
    return BoundedCache(
        max_entries=max_entries, max_bytes=100, ttl_seconds=10, size_of=len, clock=clock
    )


@pytest.mark.parametrize("size", [1, 20])
def test_no_owner_evicts_the_values_of_one_that_has_less(clock: Clock, size: int) -> None:
    """However many values one owner puts, the few of another stay; both bounds hold."""
    cache = new_shared(clock)
    cache.put("a", "x" * size, "small")
    cache.put("b", "y" * size, "small")
    for i in range(50):
        cache.put(f"{i}", "z" * size, "large")
        statistics = cache.statistics()
        assert statistics["entries"] == len(cache) <= 10
        assert statistics["bytes"] <= 100
    assert cache.get("a", "small") == "x" * size
    assert cache.get("b", "small") == "y" * size
    assert cache.get("49", "large") == "z" * size
    assert cache.get("a", "large") is None


def test_an_owner_gets_its_share_of_a_full_cache(clock: Clock) -> None:
    """Where one owner has filled the cache, another one's values take the place of its oldest."""
    cache = new_shared(clock)
    for i in range(10):
        cache.put(f"{i}", "x", "first")
    for i in range(10):
        cache.put(f"{i}", "y", "second")
    kept = {
        owner: [k for k in "0123456789" if cache.get(k, owner)] for owner in ("first", "second")
    }
    assert kept == {"first": list("56789"), "second": list("56789")}


def test_a_value_of_an_owner_can_be_removed(clock: Clock) -> None:
    """Removing a value returns it, once, and touches no other owner's."""
    cache = new_shared(clock)
    cache.put("k", "x", "a")
    cache.put("k", "y", "b")
    assert (cache.pop("k", "a"), cache.pop("k", "a")) == ("x", None)
    assert (cache.get("k", "a"), cache.get("k", "b")) == (None, "y")
