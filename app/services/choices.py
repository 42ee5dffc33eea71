"""Several answers to one request: opened together, read as they come."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from app.llm.tool_calls import Piece
from app.services.answers import Answer

# Pieces that may wait for a slow reader; past that its answers wait in the engine's queue.
_MAX_PENDING = 64


Pieces = AsyncIterator[tuple[Answer, Piece | None]]


class Choices:
    """Answers that are sent in one response; must be closed in any case.

    Attributes:
        answers: In the order of their choices.
    """

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = answers
        self._pumps: list[asyncio.Task[None]] = []
        for index, answer in enumerate(answers):
            answer.index = index

    def pieces(self) -> Pieces:
        """Each piece with its answer; ``None`` after an answer's last.

        Raises:
            ServiceError: One of the answers broke off; the others are given up.
        """
        return self.answers[0].pieces() if len(self.answers) == 1 else self._side_by_side()

    async def _side_by_side(self) -> Pieces:
        pending: asyncio.Queue[tuple[Answer, Piece | None] | Exception] = asyncio.Queue(
            _MAX_PENDING
        )

        async def pump(answer: Answer) -> None:
            try:
                async for piece in answer.pieces():
                    await pending.put(piece)
            except Exception as error:  # noqa: BLE001 - handed to the reader, which raises it
                await pending.put(error)

        self._pumps = [asyncio.create_task(pump(answer)) for answer in self.answers]
        running = len(self._pumps)
        while running:
            piece = await pending.get()
            if isinstance(piece, Exception):
                raise piece
            running -= piece[1] is None
            yield piece

    async def collect(self) -> list[list[Piece]]:
        """All pieces of each answer, once every answer is whole.

        Raises:
            ServiceError: One of the answers broke off.
        """
        pieces: list[list[Piece]] = [[] for _ in self.answers]
        async for answer, piece in self.pieces():
            if piece is not None:
                pieces[answer.index].append(piece)
        return pieces

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
