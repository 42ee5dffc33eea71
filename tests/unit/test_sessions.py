"""The session store: lifetime and bounds."""

import pytest

from app.core.config import ChatHistorySettings
from app.state.sessions import HistoryMessage, MemorySessions, SessionStore
from app.utils.errors import SessionBusyError


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


async def turn(store: SessionStore, session_id: str, text: str = "hi", owner: str = "k") -> None:
    """Add a turn of two messages."""
    session = await store.begin_turn(owner, session_id)
    await store.end_turn(session, [HistoryMessage("user", text), HistoryMessage("assistant", text)])


async def test_a_session_expires_after_being_idle_for_its_ttl() -> None:
    """Each turn restarts the time to live; without a turn the session expires."""
    clock = Clock()
    store = MemorySessions(ChatHistorySettings(ttl_seconds=10), clock)
    await turn(store, "a")
    clock.now = 9
    await turn(store, "a")
    clock.now = 18
    assert await store.find("k", "a") is not None
    clock.now = 20
    assert await store.find("k", "a") is None
    assert len(store) == 0


async def test_the_session_unused_longest_goes_first() -> None:
    """Past max_sessions the least recently used session is evicted."""
    store = MemorySessions(ChatHistorySettings(max_sessions=2))
    for name in ("a", "b", "a", "c"):
        await turn(store, name)
    assert await store.find("k", "b") is None
    assert await store.find("k", "a") is not None
    assert len(store) == 2


@pytest.mark.parametrize("bounds", [{"max_sessions": 4}, {"max_bytes": 20_000}])
async def test_a_callers_sessions_are_not_evicted_by_anothers(bounds: dict[str, int]) -> None:
    """Past any bound a caller with many sessions evicts its own."""
    store = MemorySessions(ChatHistorySettings(**bounds))
    await turn(store, "mine", "x" * 1000, owner="me")
    for i in range(50):
        await turn(store, f"{i}", "x" * 1000, owner="other")
    assert await store.find("me", "mine") is not None
    assert await store.find("other", "49") is not None
    assert await store.find("other", "0") is None


async def test_memory_is_bounded() -> None:
    """All conversations together stay within max_bytes."""
    store = MemorySessions(ChatHistorySettings(max_bytes=20_000))
    for i in range(100):
        await turn(store, f"s{i}", "x" * 1000)
    found = [await store.find("k", f"s{i}") for i in range(100)]
    total = sum(session.size for session in found if session)
    assert 0 < total <= 20_000


async def test_messages_are_bounded_by_whole_turns() -> None:
    """Past max_messages the oldest turns are dropped, and the first message is the user's."""
    store = MemorySessions(ChatHistorySettings(max_messages=5))
    for i in range(4):
        await turn(store, "a", str(i))
    session = await store.find("k", "a")
    assert session is not None
    assert [(m.role, m.content) for m in session.messages] == [
        ("user", "2"),
        ("assistant", "2"),
        ("user", "3"),
        ("assistant", "3"),
    ]


async def test_a_busy_session_takes_no_second_turn() -> None:
    """A second turn is rejected until the first has ended, also without messages."""
    store = MemorySessions(ChatHistorySettings())
    session = await store.begin_turn("k", "a")
    with pytest.raises(SessionBusyError):
        await store.begin_turn("k", "a")
    await store.end_turn(session)
    await store.end_turn(await store.begin_turn("k", "a"))
    assert len(store) == 0
