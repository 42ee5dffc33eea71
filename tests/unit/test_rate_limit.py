"""The token bucket, and the address that a request comes from."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import parse
from limits.storage import MemoryStorage

from app.core.config import RateLimitSettings
from app.core.metrics import Metrics
from app.core.rate_limit import CallerLimits, ClientAddress, TokenBucketRateLimiter
from app.utils.errors import RateLimitExceededError

# One token a second.
RATE = parse("60/minute")


@dataclass
class Clock:
    """A clock that the test sets."""

    now: float = 5000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Bucket:
    """A limiter whose buckets have five tokens."""

    clock: Clock = field(default_factory=Clock)
    limiter: TokenBucketRateLimiter = field(
        default_factory=lambda: TokenBucketRateLimiter(MemoryStorage())
    )

    def __post_init__(self) -> None:
        self.limiter.clock = self.clock
        self.limiter.burst_size = 5

    def hit(self, caller: str = "a", cost: int = 1) -> bool:
        """Take ``cost`` tokens."""
        return self.limiter.hit(RATE, caller, cost=cost)


@given(st.lists(st.floats(0, 10), max_size=200))
def test_hits_in_any_window_are_bounded(pauses: list[float]) -> None:
    """At most burst + rate * t hits pass in any t seconds, and one a second always does."""
    bucket = Bucket()
    passed: list[float] = []
    for pause in pauses:
        bucket.clock.now += pause
        if bucket.hit():
            passed.append(bucket.clock.now)
        else:
            assert pause < 1
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            allowed = 5 + (passed[last] - passed[first]) + 1e-6
            assert last - first + 1 <= allowed


def test_a_burst_passes_and_then_one_a_second() -> None:
    """A full bucket allows a burst, and an empty one allows a hit for each interval."""
    bucket = Bucket()
    assert [bucket.hit() for _ in range(7)] == [True] * 5 + [False] * 2
    for _ in range(100):
        bucket.clock.now += 1
        assert [bucket.hit(), bucket.hit()] == [True, False]


def test_rounding_never_costs_a_token() -> None:
    """Rounding of an interval that no float can hold costs no token over 1,000 intervals."""
    bucket = Bucket()
    sevenths = parse("7/minute")
    for _ in range(5):
        assert bucket.limiter.hit(sevenths, "a")
    for _ in range(1000):
        bucket.clock.now += 60 / 7
        assert bucket.limiter.hit(sevenths, "a")
        assert not bucket.limiter.hit(sevenths, "a")


def test_a_cost_takes_as_many_tokens_or_none() -> None:
    """A hit of several tokens takes all of them, or none when the bucket has fewer."""
    bucket = Bucket()
    assert bucket.hit(cost=3)
    assert not bucket.hit(cost=3)
    assert bucket.hit(cost=2)
    assert not bucket.hit(cost=6)


def test_the_statistics_describe_the_bucket() -> None:
    """The statistics have the whole tokens left, and a test tells whether there is one."""
    bucket = Bucket()
    assert bucket.limiter.test(RATE, "a")
    bucket.hit(cost=4)
    bucket.clock.now += 0.25
    assert bucket.limiter.get_window_stats(RATE, "a").remaining == 1
    bucket.hit()
    assert bucket.limiter.get_window_stats(RATE, "a").remaining == 0
    assert not bucket.limiter.test(RATE, "a")


def test_each_caller_has_a_bucket() -> None:
    """One caller's hits take no tokens of another's bucket."""
    bucket = Bucket()
    assert bucket.hit("a", cost=5)
    assert bucket.hit("b", cost=5)


def test_a_thousand_callers_at_once_get_exactly_the_burst() -> None:
    """Concurrent hits from 32 threads take exactly the tokens of a bucket."""
    bucket = Bucket()
    with ThreadPoolExecutor(32) as pool:
        shared = list(pool.map(lambda _: bucket.hit("same"), range(1000)))
        own = list(pool.map(lambda i: bucket.hit(f"caller {i}"), range(1000)))
    assert sum(shared) == 5
    assert all(own)


# --- The limits in front of the routes ------------------------------------------------------------


async def test_the_headers_describe_the_bucket() -> None:
    """The headers have the limit, the whole tokens left, and the seconds until it is full."""
    settings = RateLimitSettings(requests_per_minute=60, burst_size=5)
    limits = CallerLimits(settings, Metrics())
    clock = limits.buckets.clock = Clock()
    for _ in range(3):
        await limits.take("key:a", reason="key")
    clock.now += 0.25
    assert await limits.take("key:a", reason="key") == {
        "X-RateLimit-Limit": "5",
        "X-RateLimit-Remaining": "1",
        "X-RateLimit-Reset": "4",
    }


async def test_a_rejection_has_the_headers_too() -> None:
    """An accepted request gets the X-RateLimit headers; a rejected one gets Retry-After too."""
    metrics = Metrics()
    settings = RateLimitSettings(requests_per_minute=60, burst_size=1)
    limits = CallerLimits(settings, metrics)
    clock = limits.buckets.clock = Clock()
    headers = await limits.take("key:a", reason="key")
    assert headers["X-RateLimit-Remaining"] == "0"
    clock.now += 0.5
    with pytest.raises(RateLimitExceededError) as caught:
        await limits.take("key:a", reason="key")
    assert caught.value.headers["Retry-After"] == "1"
    assert caught.value.headers["X-RateLimit-Limit"] == "1"
    refused = metrics.registry.get_sample_value("rate_limited_total", {"reason": "key"})
    assert refused == 1
    await limits.take("key:b", reason="key")


async def test_limits_that_are_off_take_nothing() -> None:
    """With limits off every request passes, without X-RateLimit headers."""
    settings = RateLimitSettings(enabled=False, requests_per_minute=1)
    limits = CallerLimits(settings, Metrics())
    for _ in range(5):
        assert await limits.take("key:a", reason="key") == {}


# --- Addresses ------------------------------------------------------------------------------------

ADDRESSES = {
    "no proxies trusted": ([], "192.0.2.1", "198.51.100.1", "192.0.2.1"),
    "trusted": (["192.0.2.0/24"], "192.0.2.1", "198.51.100.1", "198.51.100.1"),
    "a single address trusted": (["192.0.2.1"], "192.0.2.1", "198.51.100.1", "198.51.100.1"),
    "another peer": (["192.0.2.0/24"], "203.0.113.1", "198.51.100.1", "203.0.113.1"),
    "forged in front": (["192.0.2.0/24"], "192.0.2.1", "1.1.1.1, 198.51.100.1", "198.51.100.1"),
    "two proxies": (
        ["192.0.2.0/24"],
        "192.0.2.1",
        "1.1.1.1,198.51.100.1 , 192.0.2.9",
        "198.51.100.1",
    ),
    "only proxies": (["192.0.2.0/24"], "192.0.2.1", "192.0.2.8, 192.0.2.9", "192.0.2.8"),
    "no header": (["192.0.2.0/24"], "192.0.2.1", "", "192.0.2.1"),
    "empty items": (["192.0.2.0/24"], "192.0.2.1", " , ,198.51.100.1,, ", "198.51.100.1"),
    "nonsense": (["192.0.2.0/24"], "192.0.2.1", "unknown", "unknown"),
    "IPv6": (["2001:db8::/32"], "2001:db8::1", "2001:db9::7", "2001:db9::/64"),
    "any address of a /64": ([], "2001:DB8:0:0:ffff:1:2:3", "", "2001:db8::/64"),
    "a zone": ([], "fe80::1%eth0", "", "fe80::/64"),
    "IPv4 in IPv6": ([], "::ffff:192.0.2.1", "", "192.0.2.1"),
    "IPv4 in IPv6, in hexadecimal": ([], "::FFFF:c000:201", "", "192.0.2.1"),
    "a proxy's IPv4 in IPv6": (
        ["192.0.2.0/24"],
        "::ffff:192.0.2.1",
        "198.51.100.1",
        "198.51.100.1",
    ),
    "host bits": (["192.0.2.77/24"], "192.0.2.1", "198.51.100.1", "198.51.100.1"),
    "a socket's path": ([], "/run/service.sock", "", "unknown"),
}


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "expected"), ADDRESSES.values(), ids=ADDRESSES.keys()
)
def test_only_trusted_proxies_are_believed(
    trusted: list[str], peer: str, forwarded: str, expected: str
) -> None:
    """The address is the rightmost one that is no trusted proxy's."""
    headers = {"x-forwarded-for": forwarded} if forwarded else {}
    assert ClientAddress(trusted).of((peer, 40_000), headers) == expected


def test_a_request_without_a_peer_has_no_address() -> None:
    """A request over a Unix socket has the address unknown."""
    assert ClientAddress([]).of(None, {}) == "unknown"


def test_an_address_that_uvicorn_rewrote_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Port 0 shows that uvicorn believed a header from this machine; the service does not."""
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    headers = {"x-forwarded-for": "198.51.100.1"}
    assert ClientAddress([]).of(("198.51.100.1", 0), headers) == "127.0.0.1"
    assert ClientAddress(["127.0.0.1"]).of(("198.51.100.1", 0), headers) == "198.51.100.1"
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.1")
    assert ClientAddress([]).of(("198.51.100.1", 0), {}) == "198.51.100.1"
