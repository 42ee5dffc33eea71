"""Generations, each in a task that belongs to no request, so that any of its readers may leave."""

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Self

from app.llm.report import GenerationReport, TokenLogprob
from app.llm.tool_calls import ReasoningPiece
from app.state.answers import GeneratedAnswer
from app.utils.errors import InternalError, ServiceError

# What an answer takes beside its text: keys, numbers, and Python's own overhead.
_ANSWER_OVERHEAD_BYTES = 1024
# A token's bytes, its number, and the objects that hold them.
_LOGPROB_BYTES = 160


class Flight:
    """One generation and what it has brought so far; it has any number of readers.

    The last reader to leave ends it. It listens to the place that the generation takes in the
    engine, see :class:`PlaceListener`. ``on_end`` is called when nobody may join any more.

    Attributes:
        id: Of the answer.
        said: Pieces of the answer's text and reasoning, in order; none is empty.
        logprobs: Log-probabilities of the text's tokens, where they were asked for.
        report: How the answer ended; ``None`` while it has not.
    """

    def __init__(self, on_end: Callable[["Flight"], None] = lambda _: None) -> None:
        self.id = f"gen-{uuid.uuid4().hex}"
        self.said: list[str | ReasoningPiece] = []
        self.logprobs: list[TokenLogprob] = []
        self.report: GenerationReport | None = None
        self._on_end = on_end
        self._accepted = False
        self._ended = False
        self._error: BaseException | None = None
        self._readers = 0
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, answer: GeneratedAnswer) -> Self:
        """The generation of an answer, which has ended, in one piece and under another id."""
        flight = cls()
        flight.said = [ReasoningPiece(answer.reasoning)] if answer.reasoning else []
        flight.said += [answer.text] if answer.text else []
        flight.logprobs, flight.report = answer.logprobs, answer.report
        flight._accepted = flight._ended = True
        return flight

    @property
    def answer(self) -> GeneratedAnswer | None:
        """What it came to; ``None`` where it has not ended well."""
        if self.report is None:
            return None
        text, reasoning = self.text, self.reasoning
        logprobs = sum(1 + len(entry.top) for entry in self.logprobs)
        size = len(text.encode()) + len(reasoning.encode())
        size += _LOGPROB_BYTES * logprobs + _ANSWER_OVERHEAD_BYTES
        return GeneratedAnswer(text, reasoning, self.logprobs, self.report, size)

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(piece for piece in self.said if isinstance(piece, str))

    @property
    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(piece.text for piece in self.said if isinstance(piece, ReasoningPiece))

    def start(self, work: Coroutine[Any, Any, GenerationReport]) -> None:
        """Run the generation; it calls :meth:`add`, and returns the report."""
        self._task = asyncio.create_task(self._run(work))

    async def _run(self, work: Coroutine[Any, Any, GenerationReport]) -> None:
        try:
            self.report = await work
        except asyncio.CancelledError as error:
            self._error = self._error or error
        except Exception as error:  # noqa: BLE001 - handed to every reader, which raises it
            self._error = error
        finally:
            self._end()

    def _end(self) -> None:
        self._ended = True
        self._on_end(self)
        self._announce()

    def _announce(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    # --- the generation's side ------------------------------------------------------------------

    def accepted(self) -> None:
        """The request is in the engine's queue: from now on it fails by the service's fault."""
        self._accepted = True
        self._announce()

    def failed(self, error: ServiceError) -> None:
        """The place has failed before the request was accepted: stop preparing the prompt."""
        self._error = error
        if self._task is not None:
            # Nobody may join what is about to be cancelled.
            self._on_end(self)
            self._task.cancel()

    def add(self, text: str) -> None:
        """Bring readers a further piece of the answer; its log-probabilities come first."""
        if text:
            self.said.append(text)
            self._announce()

    def add_reasoning(self, text: str) -> None:
        """Bring readers a further piece of the reasoning."""
        if text:
            self.said.append(ReasoningPiece(text))
            self._announce()

    # --- the readers' side ----------------------------------------------------------------------

    def join(self) -> None:
        """Become a reader; to be followed by :meth:`leave`."""
        self._readers += 1

    async def leave(self) -> None:
        """Stop reading. The last reader ends the generation, and waits until it has let go."""
        self._readers -= 1
        if self._readers or self._ended or self._task is None:
            return
        # Nobody may join what is about to be cancelled.
        self._on_end(self)
        self._task.cancel()
        await asyncio.wait({self._task})

    async def until_accepted(self) -> None:
        """Wait until the engine's queue has the request.

        Raises:
            ServiceError: It was refused.
        """
        while not (self._accepted or self._ended):
            await self._news.wait()
        if self._error is not None and not self.said:
            raise self._error

    async def read(self, position: int) -> Sequence[str | ReasoningPiece]:
        """Pieces of the answer from ``position`` on; waits for one, and returns none at the end.

        Raises:
            ServiceError: The answer broke off there.
            InternalError: It ended without a report.
        """
        while position == len(self.said) and not self._ended:
            await self._news.wait()
        if position == len(self.said):
            if self._error is not None:
                raise self._error
            if self.report is None:
                raise InternalError
        return self.said[position:]
