"""ServedPipeline and the chains, used as in any LangChain program."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import LLMResult
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import Runnable, RunnableSequence
from langchain_huggingface import HuggingFacePipeline

from app.llm.answer_text import TextPiece
from app.llm.chain import Chains, ServedPipeline, chat_messages
from app.llm.generator import GenerationOptions, TextGenerator
from app.llm.system_prompt import SYSTEM_PROMPT
from app.llm.tools import ChatMessage
from app.utils.errors import EngineFailedError
from tests.support.engine import EchoEngine, echo_engine

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[EchoEngine]:
    """An engine that takes 2 ms for each token."""
    async with echo_engine(echo_step_seconds=0.002) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def pipeline(engine: EchoEngine) -> ServedPipeline:
    """The served model as a LangChain model."""
    return ServedPipeline(
        model_id="echo",
        generator=TextGenerator(engine.client),
        loop=asyncio.get_running_loop(),
    )


async def test_it_is_a_hugging_face_pipeline(pipeline: ServedPipeline) -> None:
    """It is an instance of LangChain's HuggingFacePipeline."""
    assert isinstance(pipeline, HuggingFacePipeline)


async def test_ainvoke_and_astream_agree(pipeline: ServedPipeline) -> None:
    """Several streamed pieces, joined, are the invoked answer."""
    pieces = [piece async for piece in pipeline.astream("Grüße aus Köln 😀")]
    assert "".join(pieces) == await pipeline.ainvoke("Grüße aus Köln 😀") == "Grüße aus Köln 😀"
    assert len([p for p in pieces if p]) > 5


async def test_blocking_calls_work_from_other_threads(pipeline: ServedPipeline) -> None:
    """The methods invoke, stream and batch work in threads without an event loop."""

    def use() -> tuple[str, str, list[str]]:
        return (
            pipeline.invoke("one"),
            "".join(pipeline.stream("two")),
            pipeline.batch(["three", "four"]),
        )

    assert await asyncio.to_thread(use) == ("one", "two", ["three", "four"])


async def test_blocking_calls_on_the_loop_are_refused(pipeline: ServedPipeline) -> None:
    """On the event loop invoke raises an error instead of waiting for itself."""
    with pytest.raises(RuntimeError, match="ainvoke"):
        pipeline.invoke("hello")


async def test_abatch_runs_together(engine: EchoEngine, pipeline: ServedPipeline) -> None:
    """Prompts of one batch share the engine's steps."""
    peak = 0

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, engine.client.queue.snapshot().running)
            await asyncio.sleep(0.001)

    watcher = asyncio.create_task(watch())
    texts = [f"prompt number {i} " * 20 for i in range(8)]
    assert await pipeline.abatch(texts) == texts
    watcher.cancel()
    assert peak == 8


async def test_stop_and_call_parameters_are_honoured(pipeline: ServedPipeline) -> None:
    """Parameters of a call, or bound to the model, take effect."""
    assert await pipeline.ainvoke("one two three", stop=["two"]) == "one "
    assert await pipeline.ainvoke("abcdef", max_tokens=3) == "abc"
    assert await pipeline.bind(stop=["e"], max_tokens=5).ainvoke("abcdef") == "abcd"


async def test_an_unknown_parameter_is_refused(pipeline: ServedPipeline) -> None:
    """A misspelt parameter raises an error."""
    with pytest.raises(TypeError, match="temprature"):
        await pipeline.ainvoke("x", temprature=1)


async def test_usage_and_finish_reason_are_reported(pipeline: ServedPipeline) -> None:
    """The result of generate has the token usage and the finish reason."""
    result: LLMResult = await pipeline.agenerate(["abc", "abcdef"], max_tokens=4)
    infos = [g[0].generation_info or {} for g in result.generations]
    assert [i["finish_reason"] for i in infos] == ["stop", "length"]
    assert infos[0]["token_usage"]["completion_tokens"] == 4
    assert (result.llm_output or {})["token_usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 8,
        "total_tokens": 17,
        "cached_tokens": 0,
    }


async def test_streaming_callbacks_see_usage_at_the_end(pipeline: ServedPipeline) -> None:
    """A callback handler gets every piece, and the finish reason with the last."""

    class Handler(AsyncCallbackHandler):
        def __init__(self) -> None:
            self.pieces: list[str] = []
            self.result: LLMResult | None = None

        async def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
            self.pieces.append(token)

        async def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
            self.result = response

    handler = Handler()
    async for _ in pipeline.astream("hello", config={"callbacks": [handler]}):
        pass
    assert "".join(handler.pieces) == "hello"
    assert handler.result is not None
    assert (handler.result.generations[0][0].generation_info or {})["finish_reason"] == "stop"


async def test_it_composes_like_any_other_model(pipeline: ServedPipeline) -> None:
    """It works in a chain with LangChain's own prompt and parser."""
    template = PromptTemplate.from_template("say {word}")
    chain: Runnable[dict[str, str], str] = RunnableSequence(template, pipeline, StrOutputParser())
    assert await chain.ainvoke({"word": "{braces}"}) == "say {braces}"
    assert "".join([p async for p in chain.astream({"word": "it"})]) == "say it"


async def test_leaving_a_stream_frees_the_engine(
    engine: EchoEngine, pipeline: ServedPipeline
) -> None:
    """After a consumer is cancelled no request is running."""

    async def consume() -> None:
        async for _ in pipeline.astream("x" * 4000, max_tokens=4000):
            pass

    cancelled = engine.value("llm_requests_cancelled_total")
    task = asyncio.create_task(consume())
    async with asyncio.timeout(30):
        while not engine.client.queue.snapshot().running:  # noqa: ASYNC110 - polls another process
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    async with asyncio.timeout(60):
        while engine.client.queue.snapshot().running or engine.client.stats.running:  # noqa: ASYNC110 - polls another process
            await asyncio.sleep(0.01)
    # It did not simply come to its end.
    assert engine.value("llm_requests_cancelled_total") == cancelled + 1


async def test_the_chat_chain_renders_the_models_template(
    engine: EchoEngine, pipeline: ServedPipeline
) -> None:
    """The chat chain uses base_system.txt unless the caller has a system message."""
    chains = Chains(pipeline, pipeline.generator)
    asked: list[ChatMessage] = [{"role": "user", "content": "What now?"}]
    with engine.client.admit() as place:
        pieces = [
            piece async for piece in chains.stream_chat(asked, GenerationOptions(place=place))
        ]
    assert "".join(pieces) == "What now?"
    last = pieces[-1]
    assert isinstance(last, TextPiece)
    assert last.report is not None
    assert last.report.finish_reason == "stop"
    assert last.report.completion_tokens == len("What now?") + 1
    assert str(chat_messages(asked)[0].content) == SYSTEM_PROMPT
    own = chat_messages([{"role": "system", "content": "Mine."}, *asked])
    assert [m.content for m in own] == ["Mine.", "What now?"]


# The last of them, since it leaves no engine behind.
async def test_an_engine_error_reaches_the_caller_at_once(pipeline: ServedPipeline) -> None:
    """A crash of the engine raises the service's error in a batch, not a timeout."""
    with pytest.raises(EngineFailedError):
        async with asyncio.timeout(5):
            await pipeline.abatch(["[echo:crash]", "fine"])
