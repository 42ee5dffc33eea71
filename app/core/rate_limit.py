"""Rate limiting: a token bucket for each caller, behind slowapi's limiter.

Neither slowapi nor ``limits`` has a token bucket, so this module registers one with ``limits``.
Only slowapi's limiter is used (docs/adr/0006).
"""

import ipaddress
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cachetools import LRUCache
from limits import RateLimitItem, WindowStats, parse
from limits.storage import StorageTypes
from limits.strategies import STRATEGIES, RateLimiter
from slowapi import Limiter

from app.core.config import RateLimitSettings
from app.core.metrics import Metrics
from app.utils.errors import RateLimitExceededError

_STRATEGY = "token-bucket"
# Most buckets kept. A caller whose bucket is evicted starts with a full one, so the bound must be
# far above the number of callers that are active at a time. An entry takes about 200 bytes.
_MAX_BUCKETS = 100_000


class Buckets(Protocol):
    """Where the callers' buckets are."""

    async def take(self, item: RateLimitItem, caller: str, cost: int = 1) -> tuple[bool, float]:
        """Take tokens; ``False``, and nothing is taken, when the bucket has fewer.

        Returns:
            Whether there were as many, and the seconds until the bucket is full.
        """

    def owe(self, item: RateLimitItem, caller: str, cost: int) -> None:
        """Take tokens, now or very soon, that the bucket need not have.

        Until it has got what it lacks, not even none can be taken.
        """


class TokenBucketRateLimiter(RateLimiter):
    """The generic cell rate algorithm (ITU-T I.371): a token bucket stored as one number a key.

    At most ``burst_size + rate * t`` hits succeed in any ``t`` seconds.

    Attributes:
        burst_size: Tokens in a full bucket; ``None``: the limit's amount.
        clock: Monotonic seconds.
    """

    def __init__(self, storage: StorageTypes) -> None:
        super().__init__(storage)
        self.burst_size: int | None = None
        self.clock: Callable[[], float] = time.monotonic
        self._lock = threading.Lock()
        # When each bucket will be full ("theoretical arrival time"). A full bucket needs no entry.
        self._full_at: LRUCache[str, float] = LRUCache(maxsize=_MAX_BUCKETS)

    def terms(self, item: RateLimitItem) -> tuple[float, int]:
        """Seconds until one token is refilled, and tokens in a full bucket."""
        return item.get_expiry() / item.amount, self.burst_size or item.amount

    def hit(self, item: RateLimitItem, *identifiers: str, cost: int = 1) -> bool:
        """Take ``cost`` tokens; ``False``, and nothing is taken, when the bucket has fewer."""
        interval, burst = self.terms(item)
        key = item.key_for(*identifiers)
        with self._lock:
            now = self.clock()
            full_at = self._full_after(key, now, cost * interval)
            # Rounding errors of a few ulps in the sum must not cost a caller a token.
            if full_at - now > burst * interval * (1 + 1e-9):
                return False
            self._full_at[key] = full_at
            return True

    def _full_after(self, key: str, now: float, seconds: float) -> float:
        return max(self._full_at.get(key, now), now) + seconds

    def owe(self, item: RateLimitItem, caller: str, cost: int) -> None:
        """See :class:`Buckets`."""
        key, (interval, _) = item.key_for(caller), self.terms(item)
        with self._lock:
            self._full_at[key] = self._full_after(key, self.clock(), cost * interval)

    def test(self, item: RateLimitItem, *identifiers: str, cost: int = 1) -> bool:
        """Whether the bucket has ``cost`` tokens; takes none."""
        return self._tokens(item, *identifiers) >= cost

    def _seconds_until_full(self, item: RateLimitItem, *identifiers: str) -> float:
        return max(self._full_at.get(item.key_for(*identifiers), 0.0) - self.clock(), 0.0)

    def _tokens(self, item: RateLimitItem, *identifiers: str) -> float:
        interval, burst = self.terms(item)
        return burst - self._seconds_until_full(item, *identifiers) / interval + 1e-9

    def get_window_stats(self, item: RateLimitItem, *identifiers: str) -> WindowStats:
        """Unix time at which the bucket will be full, and the whole tokens in it now."""
        full_at = time.time() + self._seconds_until_full(item, *identifiers)
        return WindowStats(full_at, int(self._tokens(item, *identifiers)))

    async def take(self, item: RateLimitItem, caller: str, cost: int = 1) -> tuple[bool, float]:
        """See :class:`Buckets`."""
        return self.hit(item, caller, cost=cost), self._seconds_until_full(item, caller)


STRATEGIES[_STRATEGY] = TokenBucketRateLimiter  # type: ignore[assignment]


class CallerLimits:
    """One bucket for each API key, and one for each address that sent no valid key.

    Args:
        share: Makes the buckets that copies of the service share out of this process's own.
    """

    def __init__(
        self,
        settings: RateLimitSettings,
        metrics: Metrics,
        share: Callable[[TokenBucketRateLimiter], Buckets] = lambda own: own,
    ) -> None:
        self._enabled = settings.enabled
        self._metrics = metrics
        self._limit = parse(f"{settings.requests_per_minute}/minute")
        with warnings.catch_warnings():
            # starlette's reader warns that the null device is no regular file.
            warnings.simplefilter("ignore", UserWarning)
            limiter = Limiter(
                key_func=str,
                strategy=_STRATEGY,
                storage_uri="memory://",
                # The default would read the project's .env and look for slowapi's names in it.
                config_filename=os.devnull,
            )
        self.buckets: TokenBucketRateLimiter = limiter.limiter
        self.buckets.burst_size = settings.burst_size
        self._take = share(self.buckets).take

    async def take(self, caller: str, *, reason: str) -> dict[str, str]:
        """Take a token from the bucket of ``caller`` (``key:...`` or ``ip:...``).

        Returns:
            The X-RateLimit headers of the response; empty when limits are off.

        Raises:
            RateLimitExceededError: The bucket is empty; counted in the metrics under ``reason``.
        """
        if not self._enabled:
            return {}
        taken, full_in = await self._take(self._limit, caller)
        interval, burst = self.buckets.terms(self._limit)
        # Rounding errors must not cost a token.
        tokens = burst - full_in / interval + 1e-9
        headers = {
            "X-RateLimit-Limit": str(burst),
            "X-RateLimit-Remaining": str(max(int(tokens), 0)),
            "X-RateLimit-Reset": str(max(math.ceil((burst - tokens) * interval), 0)),
        }
        if not taken:
            self._metrics.rate_limited.labels(reason).inc()
            wait = max((1 - tokens) * interval, 0.0)
            error = RateLimitExceededError(retry_after=wait)
            error.headers.update(headers)
            raise error
        return headers


class ClientAddress:
    """Finds the client's address in ``X-Forwarded-For``, as far as trusted proxies wrote it.

    Args:
        trusted_proxies: Addresses or networks, such as ``10.0.0.0/8``.
    """

    def __init__(self, trusted_proxies: Sequence[str]) -> None:
        self._trusted = [ipaddress.ip_network(n, strict=False) for n in trusted_proxies]
        # uvicorn replaces the peer's address by a forwarded one when the peer is 127.0.0.1, or is
        # named in this variable. The port is then 0.
        self._uvicorn_configured = "FORWARDED_ALLOW_IPS" in os.environ

    def of(self, client: tuple[str, int] | None, headers: Mapping[str, str]) -> str:
        """What counts the nearest client that is no trusted proxy; see :func:`counted_by`."""
        if client is None:
            return "unknown"
        peer, port = client
        if port == 0 and not self._uvicorn_configured:
            peer = "127.0.0.1"
        forwarded = [a.strip() for a in headers.get("x-forwarded-for", "").split(",") if a.strip()]
        while forwarded and self.is_trusted(peer):
            peer = forwarded.pop()
        return counted_by(peer) or "unknown"

    def is_trusted(self, address: str) -> bool:
        """Whether this is a trusted proxy's address."""
        parsed = _parse(address)
        return parsed is not None and any(parsed in network for network in self._trusted)


def counted_by(address: str) -> str | None:
    """An IPv4 address, or the /64 of an IPv6 address; ``None`` if it is no IP address.

    A client that has one IPv6 address has the 2⁶⁴ of its network. Every spelling of an address
    gives the same result.
    """
    parsed = _parse(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(parsed), 64), strict=False))
    return None if parsed is None else str(parsed)


def _parse(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    # A socket for both families spells an IPv4 client as ::ffff:192.0.2.1.
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed
