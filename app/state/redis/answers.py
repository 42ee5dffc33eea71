"""Kept answers in Redis."""

import contextlib

import msgspec

from app.core.config import CacheSettings
from app.state.answers import GeneratedAnswer
from app.state.redis.link import NOTE, RedisLink, Script
from app.utils.errors import StateUnavailableError

_PART = "answers"

_FIND = Script("return redis.call('GET', KEYS[1])")

# KEYS: answer, index. ARGV: lifetime, most answers, answer.
_KEEP = Script(
    NOTE
    + """
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[1])
return note(KEYS[2], KEYS[1], ARGV[1], ARGV[2])
"""
)

_encode = msgspec.msgpack.Encoder().encode
_answer = msgspec.msgpack.Decoder(GeneratedAnswer).decode


class RedisAnswers:
    """Answers that copies of the service share: the latest ``cache.size`` of each API key.

    Without Redis every look-up is a miss.
    """

    def __init__(self, link: RedisLink, settings: CacheSettings) -> None:
        self._link = link
        self._settings = settings
        self._bounds = (round(settings.ttl_seconds * 1000), settings.size)
        # Answers of each owner, as last seen.
        self._counts: dict[str, int] = {}
        self._hits = self._misses = 0

    def __len__(self) -> int:
        return sum(self._counts.values())

    async def find(self, key: str, owner: str) -> GeneratedAnswer | None:
        """See :class:`AnswerStore`."""
        found: bytes | None = None
        with contextlib.suppress(StateUnavailableError):
            found = await self._link.run(_PART, _FIND, [self._link.key(_PART, owner, key)])
        if found is None:
            self._misses += 1
            return None
        self._hits += 1
        return _answer(found)

    def put(self, key: str, answer: GeneratedAnswer, owner: str) -> None:
        """See :class:`AnswerStore`."""
        if answer.size <= self._settings.max_bytes // 4:
            self._link.begin(self._put(key, answer, owner))

    async def _put(self, key: str, answer: GeneratedAnswer, owner: str) -> None:
        keys = [self._link.key(_PART, owner, key), self._link.key("index", _PART, owner)]
        with contextlib.suppress(StateUnavailableError):
            self._counts[owner] = await self._link.run(
                _PART, _KEEP, keys, (*self._bounds, _encode(answer))
            )

    def statistics(self) -> dict[str, int]:
        """See :class:`AnswerStore`; bytes are not known."""
        return {
            "entries": len(self),
            "bytes": 0,
            "max_entries": self._settings.size,
            "max_bytes": self._settings.max_bytes,
            "hits": self._hits,
            "misses": self._misses,
        }
