"""Conversations by API key; they expire, and their number and size are bounded."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from app.core.cache import BoundedCache
from app.core.config import ChatHistorySettings
from app.utils.errors import SessionBusyError

# Memory of a message without its text and tokens: the role, and Python's overhead.
_MESSAGE_OVERHEAD_BYTES = 256
_TOKEN_BYTES = 8


@dataclass(frozen=True, slots=True)
class HistoryMessage:
    """A message of the user or the assistant.

    Attributes:
        token_ids: The tokens that the model generated for an answer, where the answer is its
            whole text. The next prompt repeats them, so that the engine finds them in its cache.
        turn_tokens: For an answer, about how many tokens its whole turn adds to a prompt.
    """

    role: str
    content: str
    token_ids: tuple[int, ...] = ()
    turn_tokens: int = 0

    @property
    def size(self) -> int:
        """Estimated bytes of memory."""
        text = len(self.content.encode())
        return text + _TOKEN_BYTES * len(self.token_ids) + _MESSAGE_OVERHEAD_BYTES


@dataclass(slots=True)
class Session:
    """One caller's conversation.

    Attributes:
        owner: Id of the API key that created it.
        created_at: Unix time.
        turn: Names the turn in progress; empty while there is none.
        forgotten: Whether it was deleted during a turn; that turn is then not stored.
        response: The response that it is kept with, as JSON, where it is kept by a response's id.
    """

    owner: str
    id: str
    system: str | None = None
    messages: list[HistoryMessage] = field(default_factory=list)
    created_at: float = field(default_factory=time.time)
    turn: str = ""
    forgotten: bool = False
    response: bytes = b""

    @property
    def size(self) -> int:
        """Estimated bytes of memory."""
        text = len((self.system or "").encode()) + len(self.response)
        return sum(m.size for m in self.messages) + text + _MESSAGE_OVERHEAD_BYTES

    def add(
        self, added: Sequence[HistoryMessage], system: str | None, most: int, replaced: int = 0
    ) -> int:
        """Add a turn in place of the last ``replaced`` messages, and drop the oldest past ``most``.

        Returns:
            How many messages were dropped.
        """
        self.system = system
        messages = [*self.messages_before(replaced), *added]
        dropped = max(len(messages) - most, 0)
        while 0 < dropped < len(messages) and messages[dropped].role != "user":
            dropped += 1
        self.messages = messages[dropped:]
        return dropped

    def messages_before(self, last: int) -> list[HistoryMessage]:
        """The messages without the last ``last`` ones."""
        return self.messages[: max(0, len(self.messages) - last)]

    def after(self, session_id: str, added: Sequence[HistoryMessage], system: str | None) -> Self:
        """Another conversation: this one and one turn more. This one does not change."""
        return replace(
            self,
            id=session_id,
            system=system,
            messages=[*self.messages, *added],
            created_at=time.time(),
            turn="",
            response=b"",
        )


class SessionStore(ABC):
    """All conversations."""

    @abstractmethod
    def __len__(self) -> int:
        """Conversations that have not expired, as far as this process knows."""

    @abstractmethod
    async def find(self, owner: str, session_id: str) -> Session | None:
        """A conversation of ``owner``, or ``None``; other owners' conversations are not found.

        Raises:
            StateUnavailableError: They cannot be reached, as in the other methods.
        """

    @abstractmethod
    async def begin_turn(self, owner: str, session_id: str) -> Session:
        """Begin a turn of an existing or a new conversation; end it with :meth:`end_turn`.

        Raises:
            SessionBusyError: A turn of this conversation is in progress.
        """

    @abstractmethod
    async def end_turn(
        self,
        session: Session,
        added: Sequence[HistoryMessage] = (),
        system: str | None = None,
        *,
        replaced: int = 0,
    ) -> None:
        """End a turn and store its messages; without ``added`` the conversation does not change.

        The messages stand in the place of the last ``replaced`` ones.

        Raises:
            StateUnavailableError: The messages could not be stored; never without ``added``.
        """

    @abstractmethod
    async def keep(self, session: Session) -> None:
        """Store a conversation as it is, under its name."""

    @abstractmethod
    async def forget(self, owner: str, session_id: str) -> bool:
        """Delete a conversation; ``False`` when there is none."""


class MemorySessions(SessionStore):
    """In this process; the least recently used ones of the largest owner are evicted first.

    Not thread-safe: the event loop owns it.
    """

    def __init__(
        self, settings: ChatHistorySettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_messages = settings.max_messages
        self._sessions: BoundedCache[Session] = BoundedCache(
            max_entries=settings.max_sessions,
            max_bytes=settings.max_bytes,
            ttl_seconds=settings.ttl_seconds,
            size_of=lambda session: session.size,
            clock=clock,
        )

    def __len__(self) -> int:
        return len(self._sessions)

    async def find(self, owner: str, session_id: str) -> Session | None:
        """See :class:`SessionStore`."""
        return self._sessions.get(session_id, owner)

    async def begin_turn(self, owner: str, session_id: str) -> Session:
        """See :class:`SessionStore`."""
        session = self._sessions.get(session_id, owner) or Session(owner, session_id)
        if session.turn:
            raise SessionBusyError
        session.turn = "in progress"
        # Stored already now, so that a second turn finds that the first is in progress.
        await self.keep(session)
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
        session.turn = ""
        if session.forgotten:
            return
        if not added:
            if not session.messages:
                self._sessions.pop(session.id, session.owner)
            return
        session.add(added, system, self._max_messages, replaced)
        await self.keep(session)

    async def keep(self, session: Session) -> None:
        """See :class:`SessionStore`."""
        self._sessions.put(session.id, session, session.owner)

    async def forget(self, owner: str, session_id: str) -> bool:
        """See :class:`SessionStore`."""
        session = self._sessions.pop(session_id, owner)
        if session is None:
            return False
        session.forgotten = True
        return True
