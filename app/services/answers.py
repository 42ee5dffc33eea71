"""What the use cases take and give: jobs, and answers on their way."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.llm.engine.base import Grammar
from app.llm.generator import FinishReason, GenerationReport, TokenLogprob
from app.llm.tool_calls import Piece, ToolCallParser
from app.llm.tools import ChatMessage, ToolUse
from app.utils.errors import InternalError
from app.utils.timing import within


@dataclass(frozen=True, slots=True)
class Completion:
    """A complete answer.

    Attributes:
        id: Of this answer.
        text: What the model said.
        model: Which model said it.
        finish_reason: Why it ended.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens generated.
        cached_tokens: Prompt tokens found in the engine's KV cache.
        cached: Whether the whole answer came from the response cache.
        dropped_messages: Messages of the history that did not fit the context.
        token_ids: The answer's tokens, where they are exactly its text; see GenerationReport.
    """

    id: str
    text: str
    model: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cached: bool = False
    dropped_messages: int = 0
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """What a caller wants generated; either a prompt or messages.

    Attributes:
        prompt: Bare text to continue.
        messages: A chat to answer, each with ``role`` and ``content``.
        max_tokens: Most tokens, or ``None`` for the configured number.
        temperature: Sampling temperature, or ``None`` for the configured one.
        sampling: The other sampling fields that the caller set.
        stop: Strings that end the answer.
        caller: Id of the caller's key; answers are kept for each caller apart, and callers
            share the engine fairly.
        cache: Whether a kept answer may be served, and this one kept.
        deadline: When the answer must be complete, on the event loop's clock.
        logprobs: See :class:`GenerationOptions`.
        grammar: What the answer must look like.
        tools: Functions that the model may call.
        end_user: For whom the caller asks; kept answers are for one end user alone.
    """

    prompt: str | None = None
    messages: Sequence[ChatMessage] = ()
    max_tokens: int | None = None
    temperature: float | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    caller: str = ""
    cache: bool = True
    deadline: float | None = None
    logprobs: int | None = None
    grammar: Grammar | None = None
    tools: ToolUse | None = None
    end_user: str = ""


class Answer:
    """An answer on its way: iterate over its text, then read :attr:`completion`."""

    def __init__(
        self,
        model: str,
        report: GenerationReport,
        pieces: AsyncGenerator[str, None],
        *,
        cached: bool = False,
        deadline: float | None = None,
        parser: ToolCallParser | None = None,
    ) -> None:
        self.id = report.id
        self.model = model
        self.cached = cached
        self._deadline = deadline
        self.dropped_messages = 0
        self._on_end: Callable[[Completion | None], None] | None = None
        self._report = report
        self._pieces = pieces
        self._parser = parser
        self._text: list[str] = []
        self._sent = self._told = 0
        self._ended = False

    @property
    def calls(self) -> int:
        """Calls of tools found so far by :meth:`pieces`."""
        return self._parser.calls if self._parser else 0

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer's text and its calls of tools, piece by piece.

        Raises:
            ServiceError: The answer broke off.
        """
        parser = self._parser
        async for text in self:
            for piece in parser.feed(text) if parser else (text,):
                yield piece
        for piece in parser.flush() if parser else ():
            yield piece

    def take_logprobs(self) -> list[TokenLogprob]:
        """Log-probabilities of the tokens of the text so far that were not taken before."""
        logprobs, start = self._report.logprobs, self._told
        while self._told < len(logprobs) and (
            self._ended or logprobs[self._told].start < self._sent
        ):
            self._told += 1
        return logprobs[start : self._told]

    async def __aiter__(self) -> AsyncIterator[str]:
        """The answer's text, piece by piece.

        Raises:
            ServiceError: The answer broke off.
        """
        # The deadline is this reader's alone: a generation may have others, see ResponseCache.
        while (piece := await within(self._deadline, anext(self._pieces, None))) is not None:
            if piece:
                self._text.append(piece)
                self._sent += len(piece)
                yield piece
        self._ended = True
        self._end(self.completion)

    def on_end(self, callback: Callable[[Completion | None], None]) -> None:
        """Call ``callback`` once: with the whole answer, or with ``None`` if there is none."""
        self._on_end = callback

    def _end(self, completion: Completion | None) -> None:
        callback, self._on_end = self._on_end, None
        if callback is not None:
            callback(completion)

    async def aclose(self) -> None:
        """Stop generating, if it has not ended; must be called in any case."""
        try:
            await self._pieces.aclose()
        finally:
            self._end(None)

    @property
    def completion(self) -> Completion:
        """The whole answer, once the iteration has ended.

        Raises:
            InternalError: It has not.
        """
        report = self._report
        if report.finish_reason is None:
            raise InternalError
        return Completion(
            id=self.id,
            text="".join(self._text),
            model=self.model,
            finish_reason=report.finish_reason,
            prompt_tokens=report.prompt_tokens,
            completion_tokens=report.completion_tokens,
            cached_tokens=report.cached_tokens,
            cached=self.cached,
            dropped_messages=self.dropped_messages,
            token_ids=tuple(report.token_ids),
        )


async def collect(answer: Answer) -> Completion:
    """Wait for the whole answer.

    Raises:
        ServiceError: It broke off.
    """
    try:
        async for _ in answer:
            pass
        return answer.completion
    finally:
        await answer.aclose()
