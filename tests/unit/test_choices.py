"""Several answers read side by side: none is lost, and leaving ends them all."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from app.llm.report import GenerationReport, TokenLogprob
from app.services.answers import Answer
from app.services.choices import Choices, open_choices
from app.services.flights import Flight
from app.utils.errors import InternalError, OverloadedError

closed: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_closed() -> None:
    closed.clear()


async def saying(name: str, pieces: tuple[str, ...], flight: Flight) -> GenerationReport:
    """Generate an answer's pieces; ``wait`` never comes, ``fail`` breaks off."""
    try:
        flight.accepted()
        for piece in pieces:
            if piece == "wait":
                await asyncio.Event().wait()
            if piece == "fail":
                raise InternalError
            flight.add(piece)
            await asyncio.sleep(0)
        return GenerationReport("stop")
    finally:
        closed.append(name)


def answer(name: str, *pieces: str) -> Answer:
    """An answer on its way."""
    flight = Flight()
    flight.start(saying(name, pieces, flight))
    return Answer("m", flight)


async def test_every_piece_of_every_answer_comes_in_its_order() -> None:
    """Pieces of different answers mix; each answer's own stay in order, and it ends once."""
    choices = Choices([answer("a", *"one"), answer("b", *"three"), answer("c")])
    texts, ended = ["", "", ""], []
    async for one, piece in choices.pieces():
        if piece is None:
            ended.append(one.index)
        else:
            assert isinstance(piece, str)
            texts[one.index] += piece
    assert texts == ["one", "three", ""]
    assert sorted(ended) == [0, 1, 2]
    await choices.aclose()
    assert sorted(closed) == ["a", "b", "c"]


async def test_closing_ends_answers_that_are_being_read() -> None:
    """A reader may leave while every answer waits for its next piece."""
    choices = Choices([answer("a", "x", "wait"), answer("b", "wait")])
    reader = choices.pieces()
    assert await anext(reader) == (choices.answers[0], "x")
    await asyncio.sleep(0)
    await choices.aclose()
    assert sorted(closed) == ["a", "b"]
    assert len(asyncio.all_tasks()) == 1


async def test_one_fault_ends_all() -> None:
    """The fault reaches the reader, and the others do not go on."""
    choices = Choices([answer("a", "wait"), answer("b", "x", "fail")])
    with pytest.raises(InternalError):
        await choices.collect()
    await choices.aclose()
    assert sorted(closed) == ["a", "b"]


async def test_all_are_opened_or_none() -> None:
    """A refusal closes what was opened before it and after it."""
    refused = asyncio.Event()
    opened: list[str] = []

    async def opening(name: str) -> Answer:
        if name == "refused":
            refused.set()
            raise OverloadedError
        await refused.wait()
        made = answer(name, "x")
        opened.append(name)
        return made

    openings: list[Coroutine[Any, Any, Answer]] = [opening(n) for n in ("a", "refused", "b")]
    with pytest.raises(OverloadedError):
        await open_choices(openings)
    assert len(asyncio.all_tasks()) == 1
    assert sorted(closed) == sorted(opened)


async def test_logprobs_come_with_the_text_they_belong_to() -> None:
    """A token is told with the piece that reaches it, not as soon as it is known; none is lost."""
    entries = [
        TokenLogprob(b"ab", -1.0, 0),
        TokenLogprob(b"c", -2.0, 2),
        TokenLogprob(b"", -3.0, 3),
    ]
    flight = Flight()
    go = asyncio.Event()

    async def generate() -> GenerationReport:
        flight.logprobs += entries
        flight.add("a")
        for piece in ("b", "c"):
            await go.wait()
            go.clear()
            flight.add(piece)
        return GenerationReport("stop")

    flight.start(generate())
    one = Answer("m", flight)
    told = []
    async for _ in one.pieces():
        told.append(one.take_logprobs())
        go.set()
    assert told == [entries[:1], [], entries[1:2], entries[2:]]
    await one.aclose()
