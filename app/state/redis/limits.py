"""The callers' buckets in Redis, on Redis' clock."""

import contextlib

from limits import RateLimitItem

from app.core.rate_limit import TokenBucketRateLimiter
from app.state.redis.link import RedisLink, Script
from app.utils.errors import StateUnavailableError

_MICROSECONDS = 1e6

# As TokenBucketRateLimiter: when the bucket will be full is all that is kept, here in microseconds.
_TAKE = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local interval = tonumber(ARGV[1])
local full_at = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), now)
local after = full_at + interval * ARGV[3]
if ARGV[4] == '0' and after - now > interval * ARGV[2] + 1 then
  return {0, full_at - now}
end
if after > now then
  redis.call('SET', KEYS[1], string.format('%.17g', after), 'PX', math.ceil((after - now) / 1000))
end
return {1, after - now}
""")


class RedisBuckets:
    """Buckets that copies of the service share; without Redis, those of this process.

    Args:
        own: Buckets of this process.
    """

    def __init__(self, link: RedisLink, own: TokenBucketRateLimiter) -> None:
        self._link = link
        self._own = own

    async def take(self, item: RateLimitItem, caller: str, cost: int = 1) -> tuple[bool, float]:
        """See :class:`Buckets`."""
        try:
            return await self._take(item, caller, cost)
        except StateUnavailableError:
            return await self._own.take(item, caller, cost)

    def owe(self, item: RateLimitItem, caller: str, cost: int) -> None:
        """See :class:`Buckets`."""
        self._own.owe(item, caller, cost)
        self._link.begin(self._owe(item, caller, cost))

    async def _owe(self, item: RateLimitItem, caller: str, cost: int) -> None:
        with contextlib.suppress(StateUnavailableError):
            await self._take(item, caller, cost, owed=True)

    async def _take(
        self, item: RateLimitItem, caller: str, cost: int, *, owed: bool = False
    ) -> tuple[bool, float]:
        interval, burst = self._own.terms(item)
        key = self._link.key("limits", caller)
        arguments = (interval * _MICROSECONDS, burst, cost, int(owed))
        # A second run would take the tokens a second time.
        taken, full_in = await self._link.run("limits", _TAKE, [key], arguments, repeatable=False)
        return bool(taken), full_in / _MICROSECONDS
