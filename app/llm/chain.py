"""The LangChain side: the served model as a LangChain LLM, and the chains the routes run.

LangChain is imported here and nowhere else, since its interfaces move often.
"""

import asyncio
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from langchain.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForLLMRun,
)
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSequence
from langchain_huggingface import HuggingFacePipeline
from pydantic import ConfigDict

from app.llm.generator import GenerationOptions, TextGenerator
from app.llm.protocol import SAMPLING_FIELDS
from app.llm.report import GenerationReport
from app.llm.system_prompt import with_system_prompt
from app.llm.tools import ChatMessage, Tool

T = TypeVar("T")
Pieces = AsyncGenerator[str, None]

_MESSAGE_CLASSES: dict[str, Callable[..., AnyMessage]] = {
    "system": SystemMessage,
    "user": HumanMessage,
    "assistant": AIMessage,
    # The calls that results belong to are told apart by their order, as in the model's text.
    "tool": partial(ToolMessage, tool_call_id=""),
}
_ROLES = {"system": "system", "human": "user", "ai": "assistant", "tool": "tool"}


class ServedPipeline(HuggingFacePipeline):  # type: ignore[misc]
    """The served model as LangChain sees it: a ``HuggingFacePipeline`` that runs on the engine.

    Any LangChain program of this process can use it. Beside the parent's interface it honours
    ``stop``, ``max_tokens`` and the sampling fields (``temperature``, ``top_p``, ``top_k``,
    ``min_p``, ``repetition_penalty``, ``presence_penalty``, ``frequency_penalty``, ``seed``) on
    every call, batches requests that run at the same time, stops generating when its caller
    leaves, and reports finish reason and token usage in ``generation_info`` and ``llm_output``,
    and reasoning, if there is any, as ``reasoning_content`` in ``generation_info``.

    The synchronous methods wait for the event loop, so they are for threads other than its own.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    generator: TextGenerator
    options: GenerationOptions = GenerationOptions()
    loop: asyncio.AbstractEventLoop | None = None

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[GenerationChunk, None]:
        async for piece in self.generator.stream(prompt, _merge(self.options, stop, kwargs)):
            if piece.report is None and not (piece.logprobs or piece.reasoning):
                chunk = GenerationChunk(text=piece)
            else:
                # Validation would make a plain string of the piece.
                info = _generation_info(piece.report) if piece.report is not None else None
                chunk = GenerationChunk.model_construct(text=piece, generation_info=info)
            if run_manager is not None:
                await run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk

    async def _complete(
        self, prompt: str, stop: list[str] | None, kwargs: dict[str, Any]
    ) -> Generation:
        chunks = [chunk async for chunk in self._astream(prompt, stop, None, **kwargs)]
        text = "".join(chunk.text for chunk in chunks)
        info = dict(chunks[-1].generation_info or {})
        if reasoning := "".join(getattr(chunk.text, "reasoning", "") for chunk in chunks):
            info["reasoning_content"] = reasoning
        return Generation(text=text, generation_info=info)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002 - the interface
        **kwargs: Any,
    ) -> LLMResult:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._complete(prompt, stop, kwargs)) for prompt in prompts
                ]
        except BaseExceptionGroup as failures:
            # Callers expect the service's own error, not a group of one.
            raise failures.exceptions[0] from failures
        generations = [task.result() for task in tasks]
        return LLMResult(
            generations=[[generation] for generation in generations],
            llm_output={"model_name": self.model_id, "token_usage": _total_usage(generations)},
        )

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - the interface
        **kwargs: Any,
    ) -> LLMResult:
        result: LLMResult = self._on_loop(lambda: self._agenerate(prompts, stop, None, **kwargs))
        return result

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        chunks = self._astream(prompt, stop, None, **kwargs)
        try:
            while True:
                try:
                    chunk = self._on_loop(lambda: anext(chunks))
                except StopAsyncIteration:
                    return
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
        finally:
            self._on_loop(chunks.aclose)

    def _on_loop(self, start: Callable[[], Awaitable[T]]) -> T:
        if self.loop is None or not self.loop.is_running():
            raise RuntimeError("ServedPipeline needs the event loop its engine runs on")
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self.loop:
            raise RuntimeError("use ainvoke or astream on the event loop: invoke would block it")

        async def wait() -> T:
            return await start()

        return asyncio.run_coroutine_threadsafe(wait(), self.loop).result()


def _merge(
    options: GenerationOptions, stop: Sequence[str] | None, kwargs: dict[str, Any]
) -> GenerationOptions:
    """The bound options with one call's own; unknown arguments are refused, not ignored."""
    if "options" in kwargs:
        options = kwargs.pop("options")
    max_tokens = kwargs.pop("max_tokens", options.max_tokens)
    unknown = set(kwargs) - set(SAMPLING_FIELDS)
    if unknown:
        raise TypeError(f"ServedPipeline does not take {', '.join(sorted(unknown))}")
    sampling = options.sampling
    if kwargs:
        values = {name: getattr(sampling, name) for name in SAMPLING_FIELDS}
        sampling = type(sampling)(**{**values, **kwargs})
    return replace(
        options,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=tuple(stop) if stop is not None else options.stop,
    )


def _generation_info(report: GenerationReport) -> dict[str, Any]:
    usage = {
        "prompt_tokens": report.prompt_tokens,
        "completion_tokens": report.completion_tokens,
        "total_tokens": report.prompt_tokens + report.completion_tokens,
        "cached_tokens": report.cached_tokens,
    }
    return {"finish_reason": report.finish_reason, "token_usage": usage}


def _total_usage(generations: Sequence[Generation]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for generation in generations:
        total.update((generation.generation_info or {})["token_usage"])
    return dict(total)


class TextParser(StrOutputParser):
    """Passes text on piece by piece.

    The parent hands every streamed piece to a thread pool and runs it in a task of its own, which
    costs more than the rest of the chain together.
    """

    async def atransform(
        self,
        input: AsyncIterator[str | BaseMessage],  # noqa: A002 - the parent's name
        config: RunnableConfig | None = None,  # noqa: ARG002 - the interface
        **kwargs: Any,  # noqa: ARG002 - the interface
    ) -> AsyncGenerator[str, None]:
        """Pass the text of each piece on."""
        async for piece in input:
            yield piece if isinstance(piece, str) else str(piece.content)


class StreamingSequence(RunnableSequence[dict[str, Any], str]):
    """``prompt | model | parser``, whose stream starts no task for each piece.

    The parent does, so that tracers which listen to the chain itself see their own context; those
    which listen to the model hear of every piece all the same.
    """

    async def astream(
        self,
        input: dict[str, Any],  # noqa: A002 - the parent's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        """Stream the answer; further arguments are the model's."""
        *prompt, model, parser = self.steps
        value: Any = input
        for step in prompt:
            value = await step.ainvoke(value, config)
        pieces: Any = model.astream(value, config, **kwargs)
        texts: Any = parser.atransform(pieces, config)
        async with aclosing(pieces), aclosing(texts):
            async for text in texts:
                yield text


class ChatRenderer(Runnable[PromptValue, str]):
    """Renders messages with the model's chat template, on the tokenizer's thread."""

    def __init__(
        self,
        generator: TextGenerator,
        tools: Sequence[Tool] = (),
        values: Mapping[str, Any] | None = None,
    ) -> None:
        self._generator = generator
        self._tools = tools
        self._values = values or {}

    def invoke(
        self,
        input: PromptValue,  # noqa: A002 - the parent's name
        config: RunnableConfig | None = None,  # noqa: ARG002 - the interface
        **kwargs: Any,  # noqa: ARG002 - the interface
    ) -> str:
        """Render, on the caller's thread."""
        tokenizer = self._generator.tokenizer
        return tokenizer.chat_prompt(_plain(input.to_messages()), self._tools, self._values)

    async def ainvoke(
        self,
        input: PromptValue,  # noqa: A002 - the parent's name
        config: RunnableConfig | None = None,
        **kwargs: Any,  # noqa: ARG002 - the interface
    ) -> str:
        """Render, off the event loop."""
        return await self._generator.tokenizer.run(self.invoke, input, config)


class Chains:
    """The chains behind the generating routes: prompt | ServedPipeline | parser."""

    def __init__(self, pipeline: ServedPipeline, generator: TextGenerator) -> None:
        self.pipeline = pipeline
        self._generator = generator
        self._chat_prompt = ChatPromptTemplate([MessagesPlaceholder("messages")])
        self._parser = TextParser()
        self._text = StreamingSequence(
            first=PromptTemplate.from_template("{prompt}"), middle=[pipeline], last=self._parser
        )

    def stream_text(self, prompt: str, options: GenerationOptions) -> Pieces:
        """Continue a bare prompt; a piece with logprobs or a report is a :class:`TextPiece`."""
        return self._text.astream({"prompt": prompt}, options=options)

    def stream_chat(
        self,
        messages: Sequence[ChatMessage],
        options: GenerationOptions,
        tools: Sequence[Tool] = (),
        values: Mapping[str, Any] | None = None,
    ) -> Pieces:
        """Answer a chat; the pieces are as in :meth:`stream_text`.

        ``values`` are further variables of the chat template.
        """
        renderer = ChatRenderer(self._generator, tools, values)
        chain = StreamingSequence(
            first=self._chat_prompt, middle=[renderer, self.pipeline], last=self._parser
        )
        return chain.astream({"messages": chat_messages(messages)}, options=options)


def chat_messages(messages: Sequence[ChatMessage]) -> list[AnyMessage]:
    """Messages as LangChain has them, behind a system message."""
    return [
        _MESSAGE_CLASSES[m["role"]](
            content=m["content"],
            additional_kwargs={name: m.get(name) for name in ("token_ids", "reasoning_content")},
        )
        for m in with_system_prompt(messages)
    ]


def _plain(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    return [
        {
            "role": _ROLES[m.type],
            "content": str(m.content),
            **m.additional_kwargs,
        }
        for m in messages
    ]
