"""An engine process that dies while an answer goes on behind its reasoning."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest
from msgspec import structs

from app.llm.answer_text import TextPiece
from app.llm.client.client import EngineState
from app.llm.generator import GenerationOptions, TextGenerator
from app.llm.tokenizer import PromptTokenizer
from app.utils.errors import EngineFailedError
from tests.data.chat_templates import CHATML
from tests.support.engine import EchoEngine, echo_engine, idle, pid

# The prompt opens the reasoning, and the echo of the message is the reasoning, then the text.
TEMPLATE = CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}"
BUDGET = GenerationOptions(thinking_budget=2)


@asynccontextmanager
async def answering(text: str) -> AsyncIterator[tuple[EchoEngine, AsyncIterator[TextPiece]]]:
    """An engine whose model reasons, and its answer to a message, of two tokens of reasoning."""
    async with echo_engine(echo_step_seconds=0.05) as engine:
        assert engine.client.info is not None
        info = structs.replace(engine.client.info, chat_template=TEMPLATE)
        engine.client.tokenizer = tokenizer = PromptTokenizer(info)
        prompt = tokenizer.chat_prompt([{"role": "user", "content": text}])
        async with aclosing(TextGenerator(engine.client).stream(prompt, BUDGET)) as pieces:
            yield engine, pieces
        await idle(engine)


async def thoughts(pieces: AsyncIterator[TextPiece]) -> str:
    """The reasoning, up to its last token: the second request follows."""
    said = ""
    while len(said) < 2:
        said += (await anext(pieces)).reasoning
    return said


async def die(engine: EchoEngine) -> int:
    """Kill the engine process, and wait until that is noticed."""
    process = await pid()
    os.kill(process, signal.SIGKILL)
    await engine.until(EngineState.RESTARTING)
    return process


async def test_a_death_between_the_requests_ends_the_answer() -> None:
    """What dies with the reasoning is not gone on with."""
    async with answering("musing") as (engine, pieces):
        assert await thoughts(pieces) == "mu"
        await die(engine)
        with pytest.raises(EngineFailedError):
            await anext(pieces)
        await engine.until(EngineState.READY)
        assert engine.value("llm_requests_running") == engine.value("llm_requests_waiting") == 0


async def test_a_request_that_goes_on_is_tried_once_more() -> None:
    """What has no event of the text yet is tried again: its prompt has what the caller has seen."""
    async with answering("musing") as (engine, pieces):
        assert await thoughts(pieces) == "mu"
        os.kill(await pid(), signal.SIGSTOP)
        rest = asyncio.create_task(collect(pieces))
        while not engine.client.queue.snapshot().waiting:  # noqa: ASYNC110 - polls the task
            await asyncio.sleep(0.01)
        await die(engine)
        assert await rest == "musing"
        assert engine.client.restarts == 1


async def test_a_death_after_the_reasoning_costs_nothing() -> None:
    """Where no process has begun with the second request, the next one gets it."""
    async with answering("mu") as (engine, pieces):
        assert await thoughts(pieces) == "mu"
        # The engine ends the first request before its tokens are read here.
        while engine.client.stats.running:  # noqa: ASYNC110 - polls another process
            await asyncio.sleep(0.01)
        process = await die(engine)
        rest = asyncio.create_task(collect(pieces))
        # The next process dies before it has any request.
        os.kill(await pid(other_than=process), signal.SIGKILL)
        assert await rest == "mu"
        assert engine.client.restarts == 2


async def collect(pieces: AsyncIterator[TextPiece]) -> str:
    """The rest of the text."""
    return "".join([piece async for piece in pieces])
