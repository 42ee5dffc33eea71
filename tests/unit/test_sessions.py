"""The session store: lifetime and bounds."""

import pytest

from app.core.config import ChatHistorySettings
from app.core.sessions import HistoryMessage, SessionStore
from app.utils.errors import SessionBusyError


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def turn(store: SessionStore, session_id: str, text: str = "hi", owner: str = "k") -> None:
    """Add a turn of two messages."""
    session = store.begin_turn(owner, session_id)
    store.end_turn(session, [HistoryMessage("user", text), HistoryMessage("assistant", text)])


def test_a_session_expires_after_being_idle_for_its_ttl() -> None:
    """Each turn restarts the time to live; without a turn the session expires."""
    clock = Clock()
    store = SessionStore(ChatHistorySettings(ttl_seconds=10), clock)
    turn(store, "a")
    clock.now = 9
    turn(store, "a")
    clock.now = 18
    assert store.find("k", "a") is not None
    clock.now = 20
    assert store.find("k", "a") is None
    assert len(store) == 0


def test_the_session_unused_longest_goes_first() -> None:
    """Past max_sessions the least recently used session is evicted."""
    store = SessionStore(ChatHistorySettings(max_sessions=2))
    for name in ("a", "b", "a", "c"):
        turn(store, name)
    assert store.find("k", "b") is None
    assert store.find("k", "a") is not None
    assert len(store) == 2


@pytest.mark.parametrize("bounds", [{"max_sessions": 4}, {"max_bytes": 20_000}])
def test_a_callers_sessions_are_not_evicted_by_anothers(bounds: dict[str, int]) -> None:
    """Past any bound a caller with many sessions evicts its own."""
    store = SessionStore(ChatHistorySettings(**bounds))
    turn(store, "mine", "x" * 1000, owner="me")
    for i in range(50):
        turn(store, f"{i}", "x" * 1000, owner="other")
    assert store.find("me", "mine") is not None
    assert store.find("other", "49") is not None
    assert store.find("other", "0") is None


def test_memory_is_bounded() -> None:
    """All conversations together stay within max_bytes."""
    store = SessionStore(ChatHistorySettings(max_bytes=20_000))
    for i in range(100):
        turn(store, f"s{i}", "x" * 1000)
    total = sum(s.size for i in range(100) if (s := store.find("k", f"s{i}")))
    assert 0 < total <= 20_000


def test_messages_are_bounded_by_whole_turns() -> None:
    """Past max_messages the oldest turns are dropped, and the first message is the user's."""
    store = SessionStore(ChatHistorySettings(max_messages=5))
    for i in range(4):
        turn(store, "a", str(i))
    session = store.find("k", "a")
    assert session is not None
    assert [(m.role, m.content) for m in session.messages] == [
        ("user", "2"),
        ("assistant", "2"),
        ("user", "3"),
        ("assistant", "3"),
    ]


def test_a_busy_session_takes_no_second_turn() -> None:
    """A second turn is rejected until the first has ended, also without messages."""
    store = SessionStore(ChatHistorySettings())
    session = store.begin_turn("k", "a")
    with pytest.raises(SessionBusyError):
        store.begin_turn("k", "a")
    store.end_turn(session)
    store.end_turn(store.begin_turn("k", "a"))
    assert len(store) == 0
