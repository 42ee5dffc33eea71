"""The scripts in a real Redis, and the link to it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from app.core.config import ChatHistorySettings, IdempotencySettings, RateLimitSettings, Settings
from app.core.config.security import NamedKey, SecuritySettings
from app.core.metrics import Metrics
from app.core.rate_limit import CallerLimits
from app.core.security import KeyRing
from app.state.idempotency import Claim, KeptAnswer
from app.state.sessions import HistoryMessage, MemorySessions, Session
from app.state.shared import State, make_state
from app.utils.errors import (
    ConfigurationError,
    RateLimitExceededError,
    SessionBusyError,
    StateUnavailableError,
)
from tests.support.redis_server import RedisServer, redis_server

TURN = [HistoryMessage("user", "hi"), HistoryMessage("assistant", "ho", (1, 2), 7)]
PASSWORD = "a-secret-of-redis"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A Redis for the tests of this file."""
    with redis_server() as running:
        yield running


@asynccontextmanager
async def shared(
    server: RedisServer,
    metrics: Metrics | None = None,
    keys: KeyRing | None = None,
    **sections: Any,
) -> AsyncIterator[State]:
    """The state of one replica."""
    values: dict[str, Any] = {"backend": "redis", "url": server.url, "timeout_seconds": 20}
    values |= sections.pop("state", {})
    configured = Settings(_env_file=None, state=values, **sections)
    state = make_state(configured, metrics or Metrics(), keys or KeyRing(SecuritySettings()))
    async with state.connected:
        yield state


async def turn(state: State, session_id: str, number: int = 0, owner: str = "k") -> None:
    """A whole turn of two messages."""
    session = await state.sessions.begin_turn(owner, session_id)
    await state.sessions.end_turn(session, [HistoryMessage("user", f"{number}"), TURN[1]], "sys")


@settings(max_examples=15)
@given(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5), st.integers(2, 7))
async def test_histories_are_those_of_memory(
    server: RedisServer, roles: list[str], most: int
) -> None:
    """After the same turns a conversation in Redis is the one in memory, trimmed alike."""
    history = ChatHistorySettings(max_messages=most)
    async with shared(server, chat_history=history.model_dump()) as state:
        stores = (state.sessions, MemorySessions(history))
        await state.sessions.forget("k", "alike")
        for number in range(4):
            added = [HistoryMessage(role, f"{number}", (number,), 3) for role in roles]
            for store in stores:
                session = await store.begin_turn("k", "alike")
                # The last turn stands in place of the messages before it.
                replaced = len(roles) if number == 3 else 0
                await store.end_turn(session, added, f"{number}", replaced=replaced)
        in_redis, in_memory = [await store.find("k", "alike") for store in stores]
    # One whose messages were all dropped is there without any.
    assert (in_redis.messages if in_redis else []) == (in_memory.messages if in_memory else [])
    assert in_redis is None or in_memory is None or in_redis.system == in_memory.system


async def test_each_key_keeps_its_latest_sessions(server: RedisServer) -> None:
    """Past max_sessions a key's oldest session goes, and no other key's; a restart counts them."""
    async with shared(server, chat_history={"max_sessions": 2}) as state:
        await turn(state, "mine", owner="me")
        for name in ("a", "b", "c"):
            await turn(state, name, owner="other")
        found = [await state.sessions.find("other", name) for name in ("a", "b", "c")]
        assert [session is not None for session in found] == [False, True, True]
        assert await state.sessions.find("me", "mine")
        assert len(state.sessions) == 3


async def test_sessions_expire(server: RedisServer) -> None:
    """A session is gone from Redis after its time to live."""
    async with shared(server, chat_history={"ttl_seconds": 0.05}) as state:
        await turn(state, "brief")
        await state.sessions.keep(Session("k", "/resp", messages=TURN, response=b"{}"))
        await asyncio.sleep(0.1)
        assert await state.sessions.find("k", "brief") is None
        assert await state.sessions.find("k", "/resp") is None


async def test_a_session_that_is_too_large_is_not_kept(server: RedisServer) -> None:
    """A session over a quarter of max_bytes is dropped, as in memory."""
    async with shared(server, chat_history={"max_bytes": 8192}) as state:
        session = await state.sessions.begin_turn("k", "large")
        await state.sessions.end_turn(session, [HistoryMessage("user", "x" * 4000)])
        assert await state.sessions.find("k", "large") is None
        await turn(state, "large")
        assert await state.sessions.find("k", "large")


async def test_the_end_of_a_turn_counts_once(server: RedisServer) -> None:
    """A repeated end of a turn, whose first reply was lost, adds nothing."""
    async with shared(server) as state:
        session = await state.sessions.begin_turn("k", "repeated")
        copy = Session("k", "repeated", turn=session.turn)
        for ended in (session, copy):
            await state.sessions.end_turn(ended, TURN)
        found = await state.sessions.find("k", "repeated")
        assert found is not None
        assert found.messages == TURN


async def test_a_turn_that_lost_its_lease_is_not_stored(server: RedisServer) -> None:
    """The session of a killed replica is free after its lease, and its late turn is refused."""
    lease = {"session_lease_seconds": 1}
    async with shared(server, state=lease) as dead, shared(server, state=lease) as alive:
        late = Session("k", "lost", turn=(await dead.sessions.begin_turn("k", "lost")).turn)
        # Its process is killed: nobody renews the lease.
        await dead.connected.__aexit__(None, None, None)
        with pytest.raises(SessionBusyError):
            await alive.sessions.begin_turn("k", "lost")
        await asyncio.sleep(1.1)
        await turn(alive, "lost")
        with pytest.raises(StateUnavailableError):
            await alive.sessions.end_turn(late, TURN)
        found = await alive.sessions.find("k", "lost")
        assert found is not None
        assert len(found.messages) == 2


async def test_a_turn_outlasts_its_lease(server: RedisServer) -> None:
    """A session is busy for as long as its turn runs, and stored at its end, a deletion too."""
    lease = {"session_lease_seconds": 2}
    async with shared(server, state=lease) as one, shared(server, state=lease) as two:
        kept, deleted = [await one.sessions.begin_turn("k", name) for name in ("long", "gone")]
        assert await two.sessions.forget("k", "gone")
        await asyncio.sleep(3)
        with pytest.raises(SessionBusyError):
            await two.sessions.begin_turn("k", "long")
        for session in (kept, deleted):
            await one.sessions.end_turn(session, TURN)
        assert await two.sessions.find("k", "long")
        assert await two.sessions.find("k", "gone") is None


async def test_a_caller_that_leaves_leaves_no_lock(server: RedisServer) -> None:
    """A begin that is cancelled on its way is undone."""
    async with shared(server) as state:
        for pauses in range(6):
            begin = asyncio.create_task(state.sessions.begin_turn("k", f"left {pauses}"))
            for _ in range(pauses):
                await asyncio.sleep(0)
            begin.cancel()
            await asyncio.gather(begin, return_exceptions=True)
        async with asyncio.timeout(10):
            for pauses in range(6):
                while True:
                    try:
                        await turn(state, f"left {pauses}")
                        break
                    except SessionBusyError:
                        await asyncio.sleep(0.01)


async def test_an_answer_too_many_makes_room(server: RedisServer) -> None:
    """Past max_entries a key's oldest answer goes; a released key may be claimed again."""
    bounds = IdempotencySettings(max_entries=2).model_dump()
    async with shared(server, idempotency=bounds) as state:
        for name in ("a", "b", "c"):
            claim = await state.idempotency.claim("k", name, b"f" * 32)
            assert isinstance(claim, Claim)
            await claim.keep(KeptAnswer(200, ((b"a", b"\xff"),), b"body " + name.encode()))
        oldest = await state.idempotency.claim("k", "a", b"f" * 32)
        assert isinstance(oldest, Claim)
        await oldest.release()
        assert isinstance(await state.idempotency.claim("k", "a", b"g" * 32), Claim)
        latest = await state.idempotency.claim("k", "c", b"f" * 32)
        assert latest == KeptAnswer(200, ((b"a", b"\xff"),), b"body c")


@pytest.mark.parametrize("per_minute", [60, 7])
async def test_a_bucket_gives_its_burst(server: RedisServer, per_minute: int) -> None:
    """A bucket in Redis gives exactly its burst at once, and says when there is a token again."""
    async with shared(server, state={"prefix": f"bucket-{per_minute}"}) as state:
        limits = CallerLimits(
            RateLimitSettings(requests_per_minute=per_minute, burst_size=5), Metrics(), state.share
        )
        remaining = [(await limits.take("key:a", reason="key")) for _ in range(5)]
        assert [h["X-RateLimit-Remaining"] for h in remaining] == ["4", "3", "2", "1", "0"]
        with pytest.raises(RateLimitExceededError) as caught:
            await limits.take("key:a", reason="key")
        assert caught.value.retry_after in (60 // per_minute, 60 // per_minute + 1)
        assert await limits.take("key:b", reason="key")


async def test_the_tokens_of_a_minute_are_shared(server: RedisServer) -> None:
    """Tokens used at one replica count at the other, and at each alone while Redis is away."""
    key = NamedKey(name="few", key=SecretStr("few"), tokens_per_minute=100)
    keys = KeyRing(SecuritySettings(api_keys=[key]))
    caller = keys.principals[0].key_id
    state_settings = {"prefix": "minutes"}
    async with (
        shared(server, keys=keys, state=state_settings) as one,
        shared(server, keys=keys, state=state_settings) as two,
    ):
        for state in (one, two):
            await state.usage.check(caller)
        one.usage.add_tokens(caller, 100, 50)
        await asyncio.sleep(0.5)
        with pytest.raises(RateLimitExceededError) as caught:
            await two.usage.check(caller)
        assert caught.value.retry_after in (29, 30)
        with server.gone():
            with pytest.raises(RateLimitExceededError):
                await one.usage.check(caller)
            await two.usage.check(caller)


async def test_answers_at_once_are_shared(server: RedisServer) -> None:
    """A key's answers at once count on all replicas; those of a killed one for a lease more."""
    key = NamedKey(name="two", key=SecretStr("x"), max_concurrent=2)
    keys, metrics = KeyRing(SecuritySettings(api_keys=[key])), Metrics()
    (caller,) = keys.principals
    async with (
        shared(server, keys=keys, state={"session_lease_seconds": 3}) as killed,
        shared(server, metrics, keys=keys) as other,
    ):
        lost = killed.usage.generating(caller.key_id)
        await lost.__aenter__()
        for _ in range(3):
            async with other.usage.generating(caller.key_id):
                with pytest.raises(RateLimitExceededError):
                    async with other.usage.generating(caller.key_id):
                        raise AssertionError
    assert metrics.registry.get_sample_value("rate_limited_total", {"reason": "concurrency"}) == 3

    # The first replica has ended without giving its answer back.
    async def both(state: State) -> bool:
        with contextlib.suppress(RateLimitExceededError):
            async with (
                state.usage.generating(caller.key_id),
                state.usage.generating(caller.key_id),
            ):
                return True
        return False

    async with shared(server, keys=keys) as third, asyncio.timeout(30):
        while not await both(third):  # noqa: ASYNC110 - Redis' clock
            await asyncio.sleep(0.05)
        # Without Redis those of the replica itself count.
        with server.gone():
            async with third.usage.generating(caller.key_id), third.usage.generating(caller.key_id):
                with pytest.raises(RateLimitExceededError):
                    await third.usage.check(caller.key_id)
            await third.usage.check(caller.key_id)
    await lost.__aexit__(None, None, None)


async def test_more_callers_than_connections_wait(server: RedisServer) -> None:
    """Many callers at once share a few connections, and none of them fails."""
    metrics = Metrics()
    state_settings = {"connections": 2, "timeout_seconds": 30}
    async with shared(server, metrics, state=state_settings) as state:
        await asyncio.gather(*(turn(state, f"many {i}") for i in range(100)))
    failures = metrics.registry.get_sample_value
    assert failures("llm_shared_state_failures_total", {"part": "sessions"}) is None


async def test_after_one_time_out_calls_cost_nothing() -> None:
    """While Redis hangs only the first call waits, and the calls after it take microseconds."""
    with redis_server() as server:
        async with shared(server, state={"timeout_seconds": 0.25}) as state:
            await turn(state, "before")
            with server.stopped():
                with pytest.raises(StateUnavailableError):
                    await state.sessions.find("k", "before")
                began = time.process_time()
                for _ in range(1000):
                    with pytest.raises(StateUnavailableError):
                        await state.sessions.find("k", "before")
                assert time.process_time() - began < 1
                state.usage.add_tokens("k", 1, 2)
                assert (await state.usage.of("k"))[0].tokens == 3
            async with asyncio.timeout(30):
                while True:
                    try:
                        assert await state.sessions.find("k", "before")
                        break
                    except StateUnavailableError:
                        await asyncio.sleep(0.01)
            # What was counted meanwhile is there too.
            async with shared(server) as other:
                async with asyncio.timeout(30):
                    while (await other.usage.of("k"))[1].tokens != 3:  # noqa: ASYNC110 - another
                        await asyncio.sleep(0.01)


async def test_the_address_of_redis_is_a_secret(caplog: pytest.LogCaptureFixture) -> None:
    """The password is neither in the log of a Redis that is away nor in a refusal of the URL."""
    url = SecretStr(f"redis://:{PASSWORD}@127.0.0.1:1/0")
    configured = Settings(_env_file=None, state={"backend": "redis", "url": url})
    state = make_state(configured, Metrics(), KeyRing(SecuritySettings()))
    async with state.connected:
        assert "Redis is away" in caplog.text
    wrong = {"backend": "redis", "url": f"http://{PASSWORD}@host"}
    with pytest.raises(ConfigurationError) as caught:
        make_state(Settings(_env_file=None, state=wrong), Metrics(), KeyRing(SecuritySettings()))
    assert PASSWORD not in caplog.text + str(caught.value) + repr(configured)
