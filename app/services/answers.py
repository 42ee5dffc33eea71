"""What the use cases take and give: jobs, and answers on their way."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.llm.protocol import Grammar
from app.llm.report import GenerationReport, TokenLogprob
from app.llm.tool_calls import Piece, ReasoningPiece, ToolCallParser
from app.llm.tools import ChatMessage, ToolUse
from app.services.flights import Flight
from app.utils.errors import InternalError
from app.utils.timing import within


@dataclass(frozen=True, slots=True)
class Job:
    """What a caller wants generated; either a prompt or messages.

    Attributes:
        sampling: The sampling fields that the caller set.
        caller: Id of the caller's key.
        cache: Whether a kept answer may be served, and this one kept.
        deadline: When the answer must be complete, on the event loop's clock.
        logprobs: See :class:`GenerationOptions`.
        template_values: Further variables of the chat template.
        reasoning_effort: How much the model is to reason, in OpenAI's words.
        thinking_budget: See :class:`GenerationOptions`.
        end_user: For whom the caller asks; kept answers are for one end user alone.
    """

    prompt: str | None = None
    messages: Sequence[ChatMessage] = ()
    max_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    caller: str = ""
    cache: bool = True
    deadline: float | None = None
    logprobs: int | None = None
    grammar: Grammar | None = None
    tools: ToolUse | None = None
    end_user: str = ""
    template_values: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    thinking_budget: int | None = None


class Answer:
    """A request's reading of one generation: iterate over :meth:`pieces`, then see :attr:`report`.

    Args:
        model: Name of the model that answers.
        flight: The generation; reading it begins at once, so :meth:`aclose` must be called.
        cached: Whether the answer was kept.
        deadline: When the answer must be complete for this reader, on the event loop's clock: a
            generation may have other readers.
        parser: Reads calls of tools out of the text.

    Attributes:
        index: Its number among the choices of one response.
        dropped_messages: Messages of the history that did not fit the context.
    """

    def __init__(
        self,
        model: str,
        flight: Flight,
        *,
        cached: bool = False,
        deadline: float | None = None,
        parser: ToolCallParser | None = None,
    ) -> None:
        self.id = flight.id
        self.index = 0
        self.model = model
        self.cached = cached
        self.dropped_messages = 0
        self._flight = flight
        self._deadline = deadline
        self._parser = parser
        self._on_end: Callable[[bool], Awaitable[None]] | None = None
        # Characters read, log-probabilities taken.
        self._read = self._taken = 0
        self._ended = self._closed = False
        flight.join()

    @property
    def calls(self) -> int:
        """Calls of tools found so far."""
        return self._parser.calls if self._parser else 0

    async def until_accepted(self) -> None:
        """Wait until the engine's queue has the request.

        Raises:
            ServiceError: It was refused.
        """
        await within(self._deadline, self._flight.until_accepted())

    async def pieces(self) -> AsyncGenerator[tuple["Answer", Piece | None], None]:
        """The answer's text and its calls of tools, piece by piece; ``None`` after the last.

        Raises:
            ServiceError: The answer broke off.
        """
        parser = self._parser
        position = 0
        while texts := await within(self._deadline, self._flight.read(position)):
            position += len(texts)
            for text in texts:
                if isinstance(text, ReasoningPiece):
                    yield self, text
                    continue
                self._read += len(text)
                for piece in parser.feed(text) if parser else (text,):
                    yield self, piece
        for piece in parser.flush() if parser else ():
            yield self, piece
        self._ended = True
        await self._end(complete=True)
        yield self, None

    def take_logprobs(self) -> list[TokenLogprob]:
        """Log-probabilities of the tokens of the text so far that were not taken before."""
        logprobs, start = self._flight.logprobs, self._taken
        while self._taken < len(logprobs) and (
            self._ended or logprobs[self._taken].start < self._read
        ):
            self._taken += 1
        return logprobs[start : self._taken]

    def on_end(self, callback: Callable[[bool], Awaitable[None]]) -> None:
        """Call ``callback`` once, and say whether the answer is complete."""
        self._on_end = callback

    async def _end(self, *, complete: bool) -> None:
        callback, self._on_end = self._on_end, None
        if callback is not None:
            await callback(complete)

    async def aclose(self) -> None:
        """Stop reading; the generation ends with its last reader. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            await self._flight.leave()
        finally:
            await self._end(complete=False)

    @property
    def text(self) -> str:
        """What has been generated so far."""
        return self._flight.text

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return self._flight.reasoning

    @property
    def report(self) -> GenerationReport:
        """How the generation ended.

        Raises:
            InternalError: It has not.
        """
        if self._flight.report is None:
            raise InternalError
        return self._flight.report
