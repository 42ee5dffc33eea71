"""A chat with a memory: the history goes before the new messages, and grows by each turn."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from app.core.metrics import Metrics
from app.llm.generator import TextGenerator
from app.llm.tools import ChatMessage
from app.services.answers import Answer, Job
from app.services.generation import GenerationService
from app.state.sessions import HistoryMessage, Session, SessionStore
from app.utils.errors import (
    ResponseNotFoundError,
    SessionNotFoundError,
    UnsupportedParameterError,
)
from app.utils.timing import within


@dataclass(slots=True)
class Turn:
    """What a response continues, and how its answer is kept.

    Attributes:
        session_id: The conversation that grows by it.
        previous: Id of the kept response that it continues; that one does not change.
        keep_as: Id by which the answer is kept, with all that was said before it.
        has_instructions: Whether the job's first message holds for this turn alone.
        drops: Whether the oldest turns are left out where they do not fit the context.
        answered: What is kept as ``keep_as``, once the answer is complete.
    """

    session_id: str | None = None
    previous: str | None = None
    keep_as: str | None = None
    has_instructions: bool = False
    drops: bool = False
    answered: Session | None = None


class ConversationService:
    """Turns of conversations that callers name by a ``session_id``, and kept responses."""

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

    async def find(self, caller: str, session_id: str) -> Session:
        """A caller's conversation.

        Raises:
            SessionNotFoundError: There is none of this name for this caller.
        """
        session = await self._store.find(caller, session_id)
        if session is None or not session.messages:
            raise SessionNotFoundError
        return session

    async def forget(self, caller: str, session_id: str) -> None:
        """Delete a caller's conversation.

        Raises:
            SessionNotFoundError: There is none of this name for this caller.
        """
        if not await self._store.forget(caller, session_id):
            raise SessionNotFoundError

    async def find_response(
        self, caller: str, response_id: str, param: str | None = None
    ) -> Session:
        """A caller's response, with the conversation that it ended.

        ``param`` is the field that names it.

        Raises:
            ResponseNotFoundError: None is kept by this id for this caller.
        """
        session = await self._store.find(caller, _response_name(response_id))
        if session is None or not session.response:
            raise ResponseNotFoundError(param=param)
        return session

    async def keep_response(self, turn: Turn, response: bytes) -> None:
        """Keep what a turn of :meth:`open_response` came to, as JSON, where it is to be kept."""
        if turn.answered is not None:
            await self._store.keep(replace(turn.answered, response=response))

    async def forget_response(self, caller: str, response_id: str) -> None:
        """Delete a caller's response; those that continue it stay.

        Raises:
            ResponseNotFoundError: None is kept by this id for this caller.
        """
        if not await self._store.forget(caller, _response_name(response_id)):
            raise ResponseNotFoundError

    async def open(self, job: Job, session_id: str, *, replaced: int = 0) -> Answer:
        """Begin a turn; see :meth:`GenerationService.open`.

        The turn is kept once its answer is complete, in place of the last ``replaced`` messages.
        One that is refused, fails or is left leaves the conversation as it was.

        Raises:
            SessionBusyError: Another turn of this conversation is under way.
            UnsupportedParameterError: Conversations are switched off.
            ServiceError: Refused.
        """
        self._check_enabled("session_id")
        # The limit is on what a caller sends; the history is bounded by the context.
        job = self._generation.screen(job)
        session = await self._store.begin_turn(job.caller, session_id)
        new = list(job.messages)
        # A system message replaces the conversation's own.
        system = new.pop(0)["content"] if new[0]["role"] == "system" else session.system

        async def end(added: Sequence[HistoryMessage]) -> None:
            await self._store.end_turn(session, added, system, replaced=replaced)

        return await self._open(job, session.messages_before(replaced), new, system, end)

    async def open_response(self, job: Job, turn: Turn) -> Answer:
        """Begin a turn that may continue any kept response; see :meth:`open`.

        Its prompt is that of a request with all items before it and its own.

        Raises:
            ResponseNotFoundError: The response that it continues is not kept.
            SessionBusyError: Another turn of this conversation is under way.
            UnsupportedParameterError: Conversations are switched off.
            ServiceError: Refused.
        """
        fields = {"conversation": turn.session_id, "previous_response_id": turn.previous}
        for name, value in {**fields, "store": turn.keep_as}.items():
            if value:
                self._check_enabled(name)
        job = self._generation.screen(job)
        new = list(job.messages)
        instructions = new.pop(0)["content"] if turn.has_instructions else None
        if turn.previous:
            session = await self.find_response(job.caller, turn.previous, "previous_response_id")
        elif turn.session_id:
            session = await self._store.begin_turn(job.caller, turn.session_id)
        else:
            session = Session(job.caller, "")
        # A later system message stands where the caller has put it.
        system = session.system
        if not session.messages and new and new[0]["role"] == "system":
            system = new.pop(0)["content"]

        async def end(added: Sequence[HistoryMessage]) -> None:
            if turn.keep_as and added:
                turn.answered = session.after(_response_name(turn.keep_as), added, system)
            if turn.session_id:
                await self._store.end_turn(session, added, system)

        before = "\n\n".join(filter(None, (instructions, system)))
        return await self._open(job, session.messages, new, before, end, drops=turn.drops)

    def _check_enabled(self, param: str) -> None:
        if not self._enabled:
            raise UnsupportedParameterError(
                "Conversations are switched off here (chat_history.enabled).", param=param
            )

    async def _open(
        self,
        job: Job,
        history: list[HistoryMessage],
        new: Sequence[ChatMessage],
        system: str | None,
        end: Callable[[Sequence[HistoryMessage]], Awaitable[None]],
        *,
        drops: bool = True,
    ) -> Answer:
        """Begin a turn; ``end`` gets the messages to keep, none if it was not complete."""
        before: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
        dropped = 0
        try:
            if drops:
                fitting = self._fit(job, before, history, new)
                history, dropped = await within(job.deadline, fitting)
            answer = await self._generation.begin(
                replace(job, messages=[*before, *map(_as_message, history), *new])
            )
        except BaseException:
            await end(())
            raise
        answer.dropped_messages = dropped

        async def ended(complete: bool) -> None:
            if not complete:
                await end(())
                return
            report = answer.report
            told = report.prompt_tokens + report.completion_tokens
            turn = max(1, told - sum(m.turn_tokens for m in history))
            said = HistoryMessage("assistant", answer.text, report.token_ids, turn)
            await end([*(HistoryMessage(m["role"], m["content"]) for m in new), said])

        answer.on_end(ended)
        return answer

    async def _fit(
        self,
        job: Job,
        before: Sequence[ChatMessage],
        history: list[HistoryMessage],
        new: Sequence[ChatMessage],
    ) -> tuple[list[HistoryMessage], int]:
        """The latest turns of the history that fit the context, and how many messages do not."""
        if not history:
            return history, 0
        # Counting takes work that a request which cannot be taken must not cost.
        await self._generation.check_room(job.caller)
        room = self._generator.info.context_length - self._generation.answer_tokens(job)
        starts = [i for i, m in enumerate(history) if m.role == "user" or i == 0]
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


def _response_name(response_id: str) -> str:
    """The name of a kept response's conversation, which no caller can name."""
    return f"/{response_id}"


def _as_message(message: HistoryMessage) -> ChatMessage:
    plain: ChatMessage = {"role": message.role, "content": message.content}
    return {**plain, "token_ids": list(message.token_ids)} if message.token_ids else plain
