"""Conversations in this process: owned by a key, kept for a time, bounded in number and size."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cachetools import TTLCache

from app.core.config import ChatHistorySettings
from app.utils.errors import SessionBusyError

# What a message takes beside its text and tokens: a role, and Python's own overhead.
_MESSAGE_OVERHEAD_BYTES = 256
_TOKEN_BYTES = 8


@dataclass(frozen=True, slots=True)
class HistoryMessage:
    """One message of a conversation.

    Attributes:
        role: ``user`` or ``assistant``.
        content: Its text.
        token_ids: The very tokens the model generated, for an answer that was kept whole: the
            next prompt then begins with what the engine's KV cache holds.
    """

    role: str
    content: str
    token_ids: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Bytes it takes, roughly."""
        text = len(self.content.encode())
        return text + _TOKEN_BYTES * len(self.token_ids) + _MESSAGE_OVERHEAD_BYTES


@dataclass(slots=True)
class Session:
    """One caller's conversation.

    Attributes:
        owner: Id of the key that made it.
        id: The caller's name for it.
        system: The system message, where the caller sent one.
        messages: What was said, oldest first.
        created_at: Unix time.
        busy: Whether a turn is under way.
        forgotten: Whether it was deleted meanwhile; what is under way is then not kept.
    """

    owner: str
    id: str
    system: str | None = None
    messages: list[HistoryMessage] = field(default_factory=list)
    created_at: float = field(default_factory=time.time)
    busy: bool = False
    forgotten: bool = False

    @property
    def size(self) -> int:
        """Bytes it takes, roughly."""
        return sum(m.size for m in self.messages) + len((self.system or "").encode())


class SessionStore:
    """All conversations; the one unused longest goes first when there are too many.

    Not safe to share between threads: the event loop owns it.
    """

    def __init__(
        self, settings: ChatHistorySettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_sessions = settings.max_sessions
        self._max_messages = settings.max_messages
        self.ttl_seconds = settings.ttl_seconds
        self._sessions: TTLCache[tuple[str, str], Session] = TTLCache(
            maxsize=settings.max_bytes,
            ttl=settings.ttl_seconds,
            timer=clock,
            getsizeof=lambda session: session.size + _MESSAGE_OVERHEAD_BYTES,
        )

    def __len__(self) -> int:
        """Conversations kept now."""
        self._sessions.expire()
        return len(self._sessions)

    def find(self, owner: str, session_id: str) -> Session | None:
        """A caller's conversation; another caller's does not exist."""
        return self._sessions.get((owner, session_id))

    def begin_turn(self, owner: str, session_id: str) -> Session:
        """A conversation, old or new, for one turn; end it with :meth:`end_turn`.

        Raises:
            SessionBusyError: A turn of this conversation is under way.
        """
        session = self.find(owner, session_id) or Session(owner, session_id)
        if session.busy:
            raise SessionBusyError
        session.busy = True
        # Kept from now on, so that a second turn finds the first one under way.
        self._keep(session)
        return session

    def end_turn(
        self, session: Session, added: Sequence[HistoryMessage] = (), system: str | None = None
    ) -> None:
        """End a turn; without ``added`` the conversation is as it was before."""
        session.busy = False
        key = (session.owner, session.id)
        if session.forgotten:
            return
        if not added:
            if not session.messages:
                self._sessions.pop(key, None)
            return
        session.system = system
        messages = [*session.messages, *added][-self._max_messages :]
        while messages and messages[0].role != "user":
            del messages[0]
        session.messages = messages
        self._keep(session)

    def _keep(self, session: Session) -> None:
        key = (session.owner, session.id)
        self._sessions.pop(key, None)
        self._sessions.expire()
        if session.size + _MESSAGE_OVERHEAD_BYTES > self._sessions.maxsize:
            return
        while len(self._sessions) >= self._max_sessions:
            self._sessions.popitem()
        self._sessions[key] = session

    def forget(self, owner: str, session_id: str) -> bool:
        """Delete a conversation; whether there was one."""
        session = self._sessions.pop((owner, session_id), None)
        if session is None:
            return False
        session.forgotten = True
        return True
