"""The token bucket, and which address a request comes from."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage

from app.core.rate_limit import ClientAddress, TokenBucketRateLimiter


class Clock:
    """A clock that is moved by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock at rest."""
    return Clock()


@pytest.fixture
def bucket(clock: Callable[[], float]) -> TokenBucketRateLimiter:
    """Buckets of five tokens."""
    limiter = TokenBucketRateLimiter(MemoryStorage())
    limiter.burst_size = 5
    limiter.clock = clock
    return limiter


SIXTY = RateLimitItemPerMinute(60)


def test_a_full_bucket_gives_its_burst_and_no_more(bucket: TokenBucketRateLimiter) -> None:
    """At 60 a minute and burst 5: five pass, the sixth does not."""
    assert [bucket.hit(SIXTY, "a") for _ in range(6)] == [True] * 5 + [False]


def test_waiting_the_time_that_was_told_lets_one_through(
    bucket: TokenBucketRateLimiter, clock: Clock
) -> None:
    """After retry_after, and not before, exactly one more passes."""
    while bucket.hit(SIXTY, "a"):
        pass
    wait = bucket.state(SIXTY, "a").retry_after
    assert wait == pytest.approx(1.0)
    clock.now += wait - 0.01
    assert not bucket.hit(SIXTY, "a")
    clock.now += 0.01
    assert [bucket.hit(SIXTY, "a") for _ in range(2)] == [True, False]


def test_callers_do_not_share_a_bucket(bucket: TokenBucketRateLimiter) -> None:
    """One caller's empty bucket takes nothing from another's."""
    while bucket.hit(SIXTY, "a"):
        pass
    assert bucket.hit(SIXTY, "b")


def test_no_window_ever_exceeds_burst_plus_rate() -> None:
    """In any window t, accepted <= burst + rate * t, whatever the pattern of calls."""
    for seed in range(20):
        rng = random.Random(seed)
        clock = Clock()
        limiter = TokenBucketRateLimiter(MemoryStorage())
        burst, per_minute = rng.randint(1, 20), rng.randint(1, 600)
        limiter.burst_size, limiter.clock = burst, clock
        item = RateLimitItemPerMinute(per_minute)
        accepted: list[float] = []
        for _ in range(2000):
            clock.now += rng.choice([0.0, 0.0, rng.expovariate(per_minute / 60), 5 * rng.random()])
            if limiter.hit(item, "a"):
                accepted.append(clock.now)
        for i, start in enumerate(accepted):
            for count, end in enumerate(accepted[i:], 1):
                assert count <= burst + per_minute / 60 * (end - start) + 1e-6


def test_a_thousand_callers_at_once_get_exactly_the_burst(bucket: TokenBucketRateLimiter) -> None:
    """Concurrent hits on one bucket never overdraw it, and each caller has a bucket."""
    with ThreadPoolExecutor(32) as pool:
        shared = list(pool.map(lambda _: bucket.hit(SIXTY, "same"), range(1000)))
        own = list(pool.map(lambda i: bucket.hit(SIXTY, f"caller {i}"), range(1000)))
    assert sum(shared) == 5
    assert all(own)


def test_the_state_tells_limit_remaining_and_reset(
    bucket: TokenBucketRateLimiter, clock: Clock
) -> None:
    """What the headers say follows from the bucket."""
    assert bucket.test(SIXTY, "a")
    bucket.hit(SIXTY, "a", cost=2)
    assert bucket.state(SIXTY, "a").headers() == {
        "X-RateLimit-Limit": "5",
        "X-RateLimit-Remaining": "3",
        "X-RateLimit-Reset": "2",
    }
    assert bucket.get_window_stats(SIXTY, "a").remaining == 3
    clock.now += 10
    assert bucket.state(SIXTY, "a").remaining == 5


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "expected"),
    [
        ([], "198.51.100.7", "203.0.113.1", "198.51.100.7"),
        (["10.0.0.0/8"], "198.51.100.7", "203.0.113.1", "198.51.100.7"),
        (["10.0.0.0/8"], "10.1.2.3", "203.0.113.1", "203.0.113.1"),
        (["10.0.0.0/8"], "10.1.2.3", "6.6.6.6, 203.0.113.1, 10.9.9.9", "203.0.113.1"),
        (["10.1.2.3"], "10.1.2.3", "", "10.1.2.3"),
        (["10.1.2.3"], "10.1.2.3", "not an address", "unknown"),
        (["::1"], "::1", "2001:db8::7", "2001:db8::7"),
    ],
)
def test_only_trusted_proxies_are_believed(
    trusted: list[str], peer: str, forwarded: str, expected: str
) -> None:
    """The rightmost address that no trusted proxy stands behind counts; a forged one does not."""
    headers = {"x-forwarded-for": forwarded} if forwarded else {}
    assert ClientAddress(trusted).of((peer, 4711), headers) == expected


def test_what_uvicorn_rewrote_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uvicorn trusts 127.0.0.1 by itself and leaves port 0; that is undone unless configured."""
    headers = {"x-forwarded-for": "6.6.6.6"}
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    assert ClientAddress([]).of(("6.6.6.6", 0), headers) == "127.0.0.1"
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1")
    assert ClientAddress([]).of(("6.6.6.6", 0), headers) == "6.6.6.6"
    assert ClientAddress([]).of(None, headers) == "unknown"
