"""The choice of where state is: in this process, or in a Redis that copies of the service share."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from app.core.config import Settings
from app.core.metrics import Metrics
from app.core.rate_limit import Buckets, TokenBucketRateLimiter
from app.core.security import KeyRing
from app.state.answers import AnswerStore, MemoryAnswers
from app.state.idempotency import IdempotencyStore, MemoryIdempotency
from app.state.sessions import MemorySessions, SessionStore
from app.state.usage import UsageLedger
from app.utils.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class State:
    """What copies of a service have to agree on.

    Attributes:
        share: Makes the buckets of all copies out of this process's own.
        connected: To be entered while the service runs.
    """

    share: Callable[[TokenBucketRateLimiter], Buckets]
    sessions: SessionStore
    idempotency: IdempotencyStore
    usage: UsageLedger
    answers: AnswerStore
    connected: AbstractAsyncContextManager[Any]


def make_state(settings: Settings, metrics: Metrics, keys: KeyRing) -> State:
    """The state of ``state.backend``.

    Raises:
        ConfigurationError: Redis' client is not installed, or its URL is none.
    """
    if settings.state.backend == "memory":
        metrics.state_up.labels("memory").set(1)
        return State(
            share=lambda own: own,
            sessions=MemorySessions(settings.chat_history),
            idempotency=MemoryIdempotency(settings.idempotency, metrics),
            usage=UsageLedger(keys, metrics),
            answers=MemoryAnswers(settings.cache),
            connected=nullcontext(),
        )
    try:
        from app.state.redis.answers import RedisAnswers
        from app.state.redis.idempotency import RedisIdempotency
        from app.state.redis.leases import Leases
        from app.state.redis.limits import RedisBuckets
        from app.state.redis.link import RedisLink
        from app.state.redis.sessions import RedisSessions
        from app.state.redis.usage import RedisUsage
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise ConfigurationError(
            "configuration error: state.backend redis needs Redis' client, which the extra `redis` "
            "installs: poetry install --extras redis"
        ) from None
    link = RedisLink(settings.state, metrics)
    leases = Leases(link, settings.state.session_lease_seconds)
    return State(
        share=partial(RedisBuckets, link),
        sessions=RedisSessions(link, leases, settings.chat_history),
        idempotency=RedisIdempotency(link, leases, settings.idempotency, metrics),
        usage=RedisUsage(link, leases, keys, metrics),
        answers=RedisAnswers(link, settings.cache),
        connected=link,
    )
