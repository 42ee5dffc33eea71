"""What every backend must do in an engine process: text, deadlines, cancellations and faults.

The tests run on a real engine process for each row of tests/support/backends.py.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from app.llm.detokenizer import Detokenizer
from app.llm.generator import GenerationOptions, TextGenerator
from app.llm.protocol import JsonSchemaGrammar
from app.llm.report import GenerationReport
from app.utils.errors import (
    ContextLengthExceededError,
    DeadlineExceededError,
    InternalError,
    InvalidGrammarError,
    UnsupportedParameterError,
    ValidationFailedError,
)
from tests.support.backends import GREEDY, request, rows, settings_of
from tests.support.engine import EchoEngine, echo_engine
from tests.support.queue import read

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "the hat in the sun and the moon on the house"


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=rows())
async def engine(request: pytest.FixtureRequest, tiny_model_dir: Path) -> AsyncIterator[EchoEngine]:
    """A real engine process with each backend in turn."""
    async with echo_engine(model=settings_of(request.param, tiny_model_dir)) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def _leaves_nothing(engine: EchoEngine) -> AsyncIterator[None]:
    yield
    async with asyncio.timeout(10):
        while engine.client.stats.running or engine.client.queue.snapshot().running:  # noqa: ASYNC110 - polls another process
            await asyncio.sleep(0.01)


def options(**given: Any) -> GenerationOptions:
    """Options with defaults: greedy, 32 tokens."""
    return GenerationOptions(**{"max_tokens": 32, "sampling": GREEDY, **given})


async def pieces(
    engine: EchoEngine, asked: GenerationOptions, prompt: str = PROMPT
) -> tuple[list[str], GenerationReport]:
    """An answer in pieces, and its report."""
    said = [piece async for piece in TextGenerator(engine.client).stream(prompt, asked)]
    report = said[-1].report
    assert report is not None
    return [str(piece) for piece in said], report


async def test_pieces_are_the_text(engine: EchoEngine) -> None:
    """The joined pieces are the decoded tokens, and their number is reported."""
    said, report = await pieces(engine, options())
    tokenizer = engine.client.tokenizer
    assert tokenizer is not None
    asked = request("raw", await tokenizer.run(tokenizer.encode_text, PROMPT), max_tokens=32)
    ids = [token for event in await read(engine.client.admit(), asked) for token in event.token_ids]
    assert "".join(said) == Detokenizer(tokenizer.decoder).feed(ids)
    assert report.completion_tokens == len(ids)
    assert report.finish_reason in {"stop", "length"}


async def test_a_stop_string_ends_the_answer_before_it(engine: EchoEngine) -> None:
    """An answer has neither the stop string nor anything after it, however tokens split it."""
    text = "".join((await pieces(engine, options()))[0])
    for start, end in ((4, 5), (5, 8)):
        stop = text[start:end]
        said, report = await pieces(engine, options(stop=(stop, "never in there")))
        assert "".join(said) == text[: text.index(stop)]
        assert report.finish_reason == "stop"


async def test_any_script_is_a_prompt(engine: EchoEngine) -> None:
    """Multi-byte, joined and combining characters are accepted, and echo returns them."""
    for prompt in ("日本語 🎉 العربية", "👩‍👩‍👧‍👦" * 3, "e\u0301\u200d\ufeff"):
        said, report = await pieces(engine, options(max_tokens=100), prompt)
        assert report.finish_reason in {"stop", "length"}
        if engine.client.info and engine.client.info.backend == "echo":
            assert "".join(said) == prompt


async def test_an_empty_prompt_needs_a_token(engine: EchoEngine) -> None:
    """An empty prompt is the token that begins a text, and an error where there is none."""
    assert engine.client.info is not None
    if "bos_token" in engine.client.info.special_tokens:
        _, report = await pieces(engine, options(), "")
        assert report.prompt_tokens == 1
        return
    with pytest.raises(ValidationFailedError):
        await pieces(engine, options(), "")


async def test_one_character_is_a_prompt(engine: EchoEngine) -> None:
    """A prompt of one character gets an answer."""
    _, report = await pieces(engine, options(), "a")
    assert report.prompt_tokens == 1
    assert report.completion_tokens >= 1


async def test_the_context_boundary_is_exact(engine: EchoEngine) -> None:
    """Prompt and answer may fill the context, and one token more is an error."""
    assert engine.client.info is not None
    room = engine.client.info.context_length
    prompt = "z" * (room - 3)
    _, report = await pieces(engine, options(max_tokens=3), prompt)
    assert report.prompt_tokens == room - 3
    assert 1 <= report.completion_tokens <= 3
    with pytest.raises(ContextLengthExceededError):
        await pieces(engine, options(max_tokens=4), prompt)


async def test_a_reader_who_leaves_frees_the_slot(engine: EchoEngine) -> None:
    """Closing a stream cancels its request, and other requests go on."""
    expected, _ = await pieces(engine, options())
    stays = asyncio.create_task(pieces(engine, options()))
    with engine.client.admit() as place:
        asked = options(max_tokens=400, place=place)
        async with aclosing(TextGenerator(engine.client).stream("b" * 40, asked)) as leaves:
            await anext(leaves)
    assert "".join((await stays)[0]) == "".join(expected)
    assert place.completion_tokens < 400


async def test_a_deadline_ends_a_request(engine: EchoEngine) -> None:
    """A request past its deadline ends with that error, and other requests go on."""
    place = engine.client.admit()
    late = asyncio.create_task(read(place, request("late", max_tokens=400)))
    await asyncio.sleep(0)
    place.fail(DeadlineExceededError())
    with pytest.raises(DeadlineExceededError):
        await late
    assert (await pieces(engine, options()))[1].finish_reason is not None


async def test_an_answer_of_a_schema(engine: EchoEngine) -> None:
    """Its text is JSON of the schema, and an unsupported schema never reaches the engine."""
    assert engine.client.info is not None
    if "grammar" not in engine.client.info.supported:
        with pytest.raises(UnsupportedParameterError):
            await pieces(engine, options(grammar=JsonSchemaGrammar("{}")))
        return
    said, report = await pieces(
        engine, options(max_tokens=60, grammar=JsonSchemaGrammar('{"enum": [["ß", null], "日本"]}'))
    )
    assert json.loads("".join(said)) in (["ß", None], "日本")
    assert report.finish_reason == "stop"
    for bad in (JsonSchemaGrammar('{"not": {}}'), JsonSchemaGrammar("[" * 70_000)):
        with pytest.raises(InvalidGrammarError) as refusal:
            await pieces(engine, options(grammar=bad))
        assert len(str(refusal.value)) < 200
    assert engine.client.restarts == 0


async def test_a_token_the_model_does_not_have_fails_alone(engine: EchoEngine) -> None:
    """An id outside the vocabulary is an error of its request, and other requests go on."""
    expected, _ = await pieces(engine, options())
    stays = asyncio.create_task(pieces(engine, options()))
    for bad in ([10, 10**6], [-1, 10], []):
        with pytest.raises(InternalError):
            await read(engine.client.admit(), request(f"bad{bad}", bad))
    assert (await stays)[0] == expected
    assert engine.client.restarts == 0
