"""Usage of the API keys in Redis."""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from time import time

from app.core.metrics import Metrics
from app.core.security import KeyRing
from app.state.redis.leases import Leases
from app.state.redis.limits import RedisBuckets
from app.state.redis.link import RedisLink, Script
from app.state.usage import Usage, UsageLedger
from app.utils.errors import StateUnavailableError

_PART = "usage"
# What is counted within this time is sent together.
_GATHER_SECONDS = 0.02
_AGAIN_SECONDS = 0.5
# A day's usage is kept a day longer, for clocks that differ.
_DAY_MS = 2 * 86_400_000
# Longer than a count is sent again after Redis was away for a moment.
_ONCE_MS = 3_600_000

# KEYS: of the day, of all days, of this count, of the beginning. ARGV: lifetime of a day, of the
# count's mark, now, and what to add to each figure. A count that was added is not added again.
_ADD = Script("""
redis.call('SET', KEYS[4], ARGV[3], 'NX')
local add = KEYS[3] == '' or redis.call('SET', KEYS[3], 1, 'NX', 'PX', ARGV[2])
local figures = {}
for k = 1, 2 do
  for i = 1, 3 do
    figures[#figures + 1] = redis.call('HINCRBY', KEYS[k], i, add and ARGV[3 + i] or 0)
  end
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return {figures, redis.call('GET', KEYS[4])}
""")

# An answer under way is a key with a lease, and in its caller's index, from which those that are
# over are removed once it seems full. KEYS: answer, index. ARGV: token, lease, most answers.
_BEGIN = Script(f"""
if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
local most = tonumber(ARGV[3])
if redis.call('SCARD', KEYS[2]) >= most then
  for _, key in ipairs(redis.call('SMEMBERS', KEYS[2])) do
    if redis.call('EXISTS', key) == 0 then redis.call('SREM', KEYS[2], key) end
  end
  if redis.call('SCARD', KEYS[2]) >= most then return 0 end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SADD', KEYS[2], KEYS[1])
redis.call('PEXPIRE', KEYS[2], {_DAY_MS})
return 1
""")

_Count = tuple[str, str, tuple[int, int, int]]
"""A day, a caller, and the figures of :class:`Usage` to add."""


class RedisUsage(UsageLedger):
    """Usage that copies of the service share, and that survives them.

    Without Redis a budget is compared with the usage of this process; what was counted meanwhile
    is added once Redis is back.
    """

    def __init__(
        self,
        link: RedisLink,
        leases: Leases,
        keys: KeyRing,
        metrics: Metrics,
        clock: Callable[[], float] = time,
    ) -> None:
        super().__init__(keys, metrics, clock, partial(RedisBuckets, link))
        self._link = link
        self._leases = leases
        # By day and caller; and by a token for each, once one may have been sent.
        self._counted: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
        self._unsent: dict[str, _Count] = {}
        self._sending: asyncio.Task[None] | None = None

    async def of(self, caller: str) -> tuple[Usage, Usage]:
        """See :class:`UsageLedger`."""
        try:
            await self._send()
            return await self._add_shared("", (str(self.today), caller, (0, 0, 0)))
        except StateUnavailableError:
            return self._own(caller)

    @asynccontextmanager
    async def generating(self, caller: str) -> AsyncIterator[None]:
        """See :class:`UsageLedger`; without Redis, those of this process alone are counted."""
        principal, token = self._keys.find(caller), uuid.uuid4().hex
        async with super().generating(caller):
            if principal is None or (most := principal.max_concurrent) is None:
                yield
                return
            answer = self._link.key("generating", caller, token)
            keys = [answer, self._link.key("index", "generating", caller)]
            lease = (self._leases.milliseconds, most)
            with suppress(StateUnavailableError):
                if not await self._link.claim(_PART, _BEGIN, keys, answer, token, *lease):
                    raise self._too_many(most)
                self._leases.hold(answer, token)
            try:
                yield
            finally:
                self._leases.drop(answer)
                # The caller's next request is not to meet this one.
                await asyncio.shield(self._link.begin(self._link.release(_PART, answer, token)))

    def _add(self, caller: str, requests: int, prompt_tokens: int, completion_tokens: int) -> None:
        super()._add(caller, requests, prompt_tokens, completion_tokens)
        count = self._counted[str(self.today), caller]
        for i, figure in enumerate((requests, prompt_tokens, completion_tokens)):
            count[i] += figure
        if self._sending is None or self._sending.done():
            self._sending = self._link.begin(self._send_soon())

    async def _send_soon(self) -> None:
        pause = _GATHER_SECONDS
        while self._counted or self._unsent:
            await asyncio.sleep(pause)
            pause = _AGAIN_SECONDS
            if self._link.is_up:
                try:
                    await self._send()
                except StateUnavailableError:
                    continue

    async def _send(self) -> None:
        for (day, caller), (requests, prompt, completion) in self._counted.items():
            self._unsent[uuid.uuid4().hex] = (day, caller, (requests, prompt, completion))
        self._counted.clear()
        for token, count in list(self._unsent.items()):
            await self._add_shared(token, count)
            self._unsent.pop(token, None)

    async def _add_shared(self, token: str, count: _Count) -> tuple[Usage, Usage]:
        day, caller, figures = count
        keys = [
            self._link.key(_PART, caller, day),
            self._link.key(_PART, caller),
            self._link.key("counted", token) if token else "",
            self._link.key("since"),
        ]
        arguments = (_DAY_MS, _ONCE_MS, self.since, *figures)
        added, since = await self._link.run(_PART, _ADD, keys, arguments)
        self.since = float(since)
        return Usage(*added[:3]), Usage(*added[3:])
