"""Several answers to one request: opened together, read as they come."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from app.llm.tool_calls import Piece
from app.services.answers import Answer

# Pieces that may wait for a slow reader; past that its answers wait in the engine's queue.
_MAX_PENDING = 64


class Choices:
    """Answers that are sent in one response; must be closed in any case.

    Attributes:
        answers: In the order of their choices.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = answers
        self._pumps: list[asyncio.Task[None]] = []

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | None]]:
        """Each choice's pieces with its index; ``None`` after its last.

        Raises:
            ServiceError: One of the answers broke off; the others are given up.
        """
        if len(self.answers) == 1:
            async for only in self.answers[0].pieces():
                yield 0, only
            yield 0, None
            return
        pending: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue(
            _MAX_PENDING
        )

        async def pump(index: int, answer: Answer) -> None:
            try:
                async for piece in answer.pieces():
                    await pending.put((index, piece))
                await pending.put((index, None))
            except Exception as error:  # noqa: BLE001 - handed to the reader, which raises it
                await pending.put((index, error))

        self._pumps = [asyncio.create_task(pump(i, a)) for i, a in enumerate(self.answers)]
        running = len(self._pumps)
        while running:
            index, piece = await pending.get()
            if isinstance(piece, BaseException):
                raise piece
            running -= piece is None
            yield index, piece

    async def aclose(self) -> None:
        """Stop generating what has not ended."""
        # An answer cannot be closed while a task reads it.
        for task in self._pumps:
            task.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for answer in self.answers:
            await answer.aclose()


async def open_choices(openings: Sequence[Coroutine[Any, Any, Answer]]) -> Choices:
    """Open every answer, or none.

    Raises:
        ServiceError: One was refused; those that were not are closed.
    """
    if len(openings) == 1:
        return Choices([await openings[0]])
    tasks = [asyncio.ensure_future(opening) for opening in openings]
    try:
        return Choices(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        for opened in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(opened, Answer):
                await opened.aclose()
        raise
