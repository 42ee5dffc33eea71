"""Conversations in Redis: a list each, with what is not a message as its first element."""

import asyncio
import uuid
from collections.abc import Sequence

import msgspec

from app.core.config import ChatHistorySettings
from app.state.redis.leases import Leases
from app.state.redis.link import NOTE, RedisLink, Script
from app.state.sessions import HistoryMessage, Session, SessionStore
from app.utils.errors import SessionBusyError, StateUnavailableError

_PART = "sessions"

# The lock of a session is the token of its turn. After a turn it is '~' and the token for a while,
# so that the end of a turn may be repeated; after a deletion during the turn it is '~' (DELETED).

_FIND = Script("return redis.call('LRANGE', KEYS[1], 0, -1)")

# KEYS: session, lock. ARGV: token, lease.
_BEGIN = Script("""
local held = redis.call('GET', KEYS[2])
if held and held ~= ARGV[1] and string.sub(held, 1, 1) ~= '~' then return false end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
return redis.call('LRANGE', KEYS[1], 0, -1)
""")

# KEYS: session, index, lock. ARGV: lifetime, most sessions, token, lease, messages to drop at the
# beginning and at the end, and the elements.
_END = Script(
    NOTE
    + """
local held = redis.call('GET', KEYS[3])
if held == '~' .. ARGV[3] then return redis.call('ZCARD', KEYS[2]) end
if held == '~' then return 0 end
if held ~= ARGV[3] then return -1 end
redis.call('LTRIM', KEYS[1], 1 + ARGV[5], -1 - ARGV[6])
for i = 8, #ARGV do redis.call('RPUSH', KEYS[1], ARGV[i]) end
redis.call('LPUSH', KEYS[1], ARGV[7])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('SET', KEYS[3], '~' .. ARGV[3], 'PX', ARGV[4])
return note(KEYS[2], KEYS[1], ARGV[1], ARGV[2])
"""
)

# KEYS: session, index. ARGV: lifetime, most sessions, elements.
_KEEP = Script(
    NOTE
    + """
redis.call('DEL', KEYS[1])
for i = 3, #ARGV do redis.call('RPUSH', KEYS[1], ARGV[i]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return note(KEYS[2], KEYS[1], ARGV[1], ARGV[2])
"""
)

# KEYS: session, index, lock. ARGV: lease.
_FORGET = Script("""
local held = redis.call('GET', KEYS[3])
local busy = held and string.sub(held, 1, 1) ~= '~'
if busy then redis.call('SET', KEYS[3], '~', 'PX', ARGV[1]) end
redis.call('ZREM', KEYS[2], KEYS[1])
return redis.call('DEL', KEYS[1]) == 1 or busy
""")


class _Rest(msgspec.Struct, array_like=True):
    """What a session is beside its messages."""

    system: str | None
    created_at: float
    response: bytes


_encode = msgspec.msgpack.Encoder().encode
_message = msgspec.msgpack.Decoder(HistoryMessage).decode
_rest = msgspec.msgpack.Decoder(_Rest).decode


class RedisSessions(SessionStore):
    """Conversations that copies of the service share.

    Each API key keeps its ``max_sessions`` latest. The bytes of all are for Redis to bound; one
    that is larger than a quarter of ``max_bytes`` is not kept.
    """

    def __init__(self, link: RedisLink, leases: Leases, settings: ChatHistorySettings) -> None:
        self._link = link
        self._leases = leases
        self._settings = settings
        self._bounds = (round(settings.ttl_seconds * 1000), settings.max_sessions)
        # Conversations of each owner, as last seen.
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(self._counts.values())

    async def find(self, owner: str, session_id: str) -> Session | None:
        """See :class:`SessionStore`."""
        found = await self._link.run(_PART, _FIND, [self._session(owner, session_id)])
        return _read(owner, session_id, found) if found else None

    async def begin_turn(self, owner: str, session_id: str) -> Session:
        """See :class:`SessionStore`."""
        turn = uuid.uuid4().hex
        lock = self._lock(owner, session_id)
        keys = [self._session(owner, session_id), lock]
        lease = self._leases.milliseconds
        found = await self._link.claim(_PART, _BEGIN, keys, lock, turn, lease)
        if found is None:
            raise SessionBusyError
        self._leases.hold(lock, turn)
        session = _read(owner, session_id, found) if found else Session(owner, session_id)
        session.turn = turn
        return session

    async def end_turn(
        self,
        session: Session,
        added: Sequence[HistoryMessage] = (),
        system: str | None = None,
        *,
        replaced: int = 0,
    ) -> None:
        """See :class:`SessionStore`."""
        # A caller that leaves now must not leave half of it undone.
        await asyncio.shield(self._link.begin(self._end(session, added, system, replaced)))

    async def _end(
        self,
        session: Session,
        added: Sequence[HistoryMessage],
        system: str | None,
        replaced: int,
    ) -> None:
        lock = self._lock(session.owner, session.id)
        try:
            if not added:
                await self._link.release(_PART, lock, session.turn)
                return
            before = len(session.messages_before(replaced))
            most = self._settings.max_messages
            dropped = min(session.add(added, system, most, replaced), before)
            if self._is_too_large(session):
                await self.forget(session.owner, session.id)
                return
            new = session.messages[before - dropped :]
            turn = (session.turn, self._leases.milliseconds, dropped, replaced)
            ended = await self._write(_END, session, new, *turn, lock=lock)
        finally:
            self._leases.drop(lock)
        if ended < 0:
            # The lease has run out, while Redis was away, and another turn may have begun.
            raise StateUnavailableError

    async def keep(self, session: Session) -> None:
        """See :class:`SessionStore`."""
        if not self._is_too_large(session):
            await self._write(_KEEP, session, session.messages)

    async def forget(self, owner: str, session_id: str) -> bool:
        """See :class:`SessionStore`."""
        keys = [*self._keys(owner, session_id), self._lock(owner, session_id)]
        # Run twice, it would say that there was none.
        lease = self._leases.milliseconds
        return bool(await self._link.run(_PART, _FORGET, keys, [lease], repeatable=False))

    async def _write(
        self,
        script: Script,
        session: Session,
        messages: Sequence[HistoryMessage],
        *turn: str | int,
        lock: str | None = None,
    ) -> int:
        rest = _Rest(session.system, session.created_at, session.response)
        keys = [*self._keys(session.owner, session.id), *([lock] if lock else [])]
        elements = map(_encode, (rest, *messages))
        count: int = await self._link.run(_PART, script, keys, (*self._bounds, *turn, *elements))
        if count > 0:
            self._counts[session.owner] = count
        return count

    def _is_too_large(self, session: Session) -> bool:
        return session.size > self._settings.max_bytes // 4

    def _session(self, owner: str, session_id: str) -> str:
        return self._link.key(_PART, owner, session_id)

    def _lock(self, owner: str, session_id: str) -> str:
        return self._link.key("turns", owner, session_id)

    def _keys(self, owner: str, session_id: str) -> list[str]:
        """Of a session, and of the index of its owner's sessions."""
        return [self._session(owner, session_id), self._link.key("index", _PART, owner)]


def _read(owner: str, session_id: str, elements: Sequence[bytes]) -> Session:
    rest = _rest(elements[0])
    messages = [_message(element) for element in elements[1:]]
    return Session(
        owner, session_id, rest.system, messages, rest.created_at, response=rest.response
    )
