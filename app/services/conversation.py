"""A chat with a memory: the history goes before the new messages, and grows by each turn."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from app.core.metrics import Metrics
from app.core.sessions import HistoryMessage, Session, SessionStore
from app.llm.generator import TextGenerator
from app.llm.tools import ChatMessage
from app.services.answers import Answer, Job
from app.services.generation import GenerationService
from app.utils.errors import SessionNotFoundError, UnsupportedParameterError
from app.utils.timing import within


class ConversationService:
    """Turns of conversations that callers name by a ``session_id``."""

    def __init__(
        self,
        *,
        store: SessionStore,
        generation: GenerationService,
        generator: TextGenerator,
        metrics: Metrics,
        enabled: bool,
    ) -> None:
        self._store = store
        self._generation = generation
        self._generator = generator
        self._enabled = enabled
        metrics.sessions_active.set_function(lambda: len(store))

    @property
    def ttl_seconds(self) -> float:
        """How long an idle conversation is kept."""
        return self._store.ttl_seconds

    @property
    def active(self) -> int:
        """Conversations kept now."""
        return len(self._store)

    def find(self, caller: str, session_id: str) -> Session:
        """A caller's conversation.

        Raises:
            SessionNotFoundError: There is none of this name for this caller.
        """
        session = self._store.find(caller, session_id)
        if session is None or not session.messages:
            raise SessionNotFoundError
        return session

    def forget(self, caller: str, session_id: str) -> None:
        """Delete a caller's conversation.

        Raises:
            SessionNotFoundError: There is none of this name for this caller.
        """
        if not self._store.forget(caller, session_id):
            raise SessionNotFoundError

    async def open(self, job: Job, session_id: str) -> Answer:
        """Begin a turn; see :meth:`GenerationService.open`.

        The turn is kept once its answer is complete. One that is refused, fails or is left
        leaves the conversation as it was.

        Raises:
            SessionBusyError: Another turn of this conversation is under way.
            UnsupportedParameterError: Conversations are switched off.
            ServiceError: Refused.
        """
        if not self._enabled:
            raise UnsupportedParameterError(
                "Conversations are switched off here (chat_history.enabled).", param="session_id"
            )
        # The limit is on what a caller sends; the history is bounded by the context.
        job = self._generation.screen(job)
        session = self._store.begin_turn(job.caller, session_id)
        try:
            return await self._open(job, session)
        except BaseException:
            self._store.end_turn(session)
            raise

    async def _open(self, job: Job, session: Session) -> Answer:
        new = list(job.messages)
        system = session.system
        if new[0]["role"] == "system":
            system = new.pop(0)["content"]
        before: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
        fitting = self._fit(job, before, session.messages, new)
        history, dropped = await within(job.deadline, fitting)
        answer = await self._generation.begin(
            replace(job, messages=[*before, *map(_as_message, history), *new])
        )
        answer.dropped_messages = dropped

        def end(complete: bool) -> None:
            if not complete:
                self._store.end_turn(session)
                return
            report = answer.report
            told = report.prompt_tokens + report.completion_tokens
            turn = max(1, told - sum(m.turn_tokens for m in history))
            said = HistoryMessage("assistant", answer.text, report.token_ids, turn)
            asked = [HistoryMessage(m["role"], m["content"]) for m in new]
            self._store.end_turn(session, [*asked, said], system)

        answer.on_end(end)
        return answer

    async def _fit(
        self,
        job: Job,
        before: Sequence[ChatMessage],
        history: Sequence[HistoryMessage],
        new: Sequence[ChatMessage],
    ) -> tuple[Sequence[HistoryMessage], int]:
        """The latest turns of the history that fit the context, and how many messages do not."""
        if not history:
            return history, 0
        # Counting takes work that a request which cannot be taken must not cost.
        self._generation.check_room(job.caller)
        room = self._generator.info.context_length - self._generation.answer_tokens(job)
        starts = [i for i, m in enumerate(history) if m.role == "user"]
        sizes = [
            sum(m.turn_tokens for m in history[start:end])
            for start, end in pairwise([*starts, len(history)])
        ]
        # What the turns add is known roughly, and what a prompt has is counted, which takes the
        # tokenizer's thread milliseconds. So counting begins where one turn too many may be left.
        first, excess = 0, sum(sizes) - max(sizes) - room
        while True:
            while excess > 0 and first < len(starts):
                excess -= sizes[first]
                first += 1
            if first == len(starts):
                return [], len(history)
            fitting = history[starts[first] :]
            messages = [*before, *map(_as_message, fitting), *new]
            tokens = await self._generation.prompt_tokens(replace(job, messages=messages))
            excess = len(tokens) - room
            if excess <= 0:
                return fitting, starts[first]


def _as_message(message: HistoryMessage) -> ChatMessage:
    plain: ChatMessage = {"role": message.role, "content": message.content}
    return {**plain, "token_ids": list(message.token_ids)} if message.token_ids else plain
