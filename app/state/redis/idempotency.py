"""Idempotency keys in Redis."""

import asyncio
import contextlib
import hashlib
import uuid
from collections.abc import Collection

import msgspec

from app.core.config import IdempotencySettings
from app.core.metrics import Metrics
from app.state.idempotency import IdempotencyStore, KeptAnswer, Taken
from app.state.redis.leases import Leases
from app.state.redis.link import NOTE, RedisLink, Script
from app.utils.errors import StateUnavailableError

_PART = "idempotency"

# A value is '?', the fingerprint of 32 bytes and a token while the request is in progress, and
# '!', the fingerprint and the answer afterwards.

# ARGV: value, lease.
_CLAIM = Script("""
local known = redis.call('GET', KEYS[1])
if not known or known == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return 'new'
end
if string.sub(known, 2, 33) ~= string.sub(ARGV[1], 2, 33) then return 'reused' end
if string.sub(known, 1, 1) == '?' then return 'in_use' end
return '!' .. string.sub(known, 34)
""")

# KEYS: entry, index. ARGV: lifetime, most entries, value before, value after.
_SETTLE = Script(
    NOTE
    + """
if redis.call('GET', KEYS[1]) ~= ARGV[3] then return 0 end
redis.call('SET', KEYS[1], ARGV[4], 'PX', ARGV[1])
return note(KEYS[2], KEYS[1], ARGV[1], ARGV[2])
"""
)

_encode = msgspec.msgpack.Encoder().encode
_answer = msgspec.msgpack.Decoder(KeptAnswer).decode


class RedisIdempotency(IdempotencyStore):
    """Requests and answers that copies of the service share.

    Each API key keeps its ``max_entries`` latest.
    """

    def __init__(
        self, link: RedisLink, leases: Leases, settings: IdempotencySettings, metrics: Metrics
    ) -> None:
        super().__init__(settings, metrics)
        self._link = link
        self._leases = leases
        self._bounds = (round(settings.ttl_seconds * 1000), settings.max_entries)

    async def _take(self, caller: str, key: str, fingerprint: bytes) -> Taken:
        # The key is any text of a caller.
        entry = self._link.key(_PART, caller, hashlib.sha256(key.encode()).hexdigest())
        value = b"?" + fingerprint + uuid.uuid4().bytes
        lease = self._leases.milliseconds
        found: bytes = await self._link.claim(_PART, _CLAIM, [entry], entry, value, lease)
        if found == b"reused":
            return "reused"
        if found == b"in_use":
            return "in_use"
        if found != b"new":
            return _answer(memoryview(found)[1:])
        self._leases.hold(entry, value)

        async def end(answer: KeptAnswer | None) -> None:
            # A caller that leaves now must not leave half of it undone.
            ending = self._end(self._link.key("index", _PART, caller), entry, value, answer)
            await asyncio.shield(self._link.begin(ending))

        return end

    async def _end(self, index: str, entry: str, value: bytes, answer: KeptAnswer | None) -> None:
        try:
            if answer is None:
                await self._link.release(_PART, entry, value)
                return
            # The answer is there, and goes out; a repeated request will be executed again.
            with contextlib.suppress(StateUnavailableError):
                settled = b"!" + value[1:33] + _encode(answer)
                await self._link.run(
                    _PART, _SETTLE, [entry, index], (*self._bounds, value, settled)
                )
        finally:
            self._leases.drop(entry)

    def keep_only(self, callers: Collection[str]) -> None:
        """Nothing: Redis forgets them when their time is over."""
