"""The one use case behind every route that generates: check, admit, generate, account."""

import json
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from opentelemetry.trace import Tracer

from app.core.config import ModelSettings
from app.core.config.security import SecuritySettings
from app.core.logging import get_logger
from app.llm.answer_text import TextPiece
from app.llm.client.client import EngineClient
from app.llm.client.place import Place
from app.llm.ebnf.check import broken_keywords, fit_grammar
from app.llm.generator import GenerationOptions, TextGenerator
from app.llm.models.recommended_sampling import DEFAULT_SAMPLING
from app.llm.protocol import Grammar, SamplingParams
from app.llm.report import GenerationReport
from app.llm.system_prompt import SYSTEM_PROMPT
from app.llm.tool_calls import ToolCallParser
from app.llm.tools import ChatMessage, Tool, ToolCall, ToolUse
from app.services.answers import Answer, Job
from app.services.flights import Flight
from app.services.response_cache import ResponseCache, cache_key
from app.services.schema_values import schema_values
from app.services.screening import Screening
from app.services.traces import record_generation
from app.state.usage import UsageLedger
from app.utils.errors import (
    InternalError,
    PromptTooLongError,
    UnsupportedParameterError,
    ValidationFailedError,
)

if TYPE_CHECKING:
    from app.llm.chain import Chains

log = get_logger("generation")


class GenerationService:
    """Generates answers for every router.

    ``chains`` is called once the engine takes requests, and not before: what the chains are made of
    is still being imported until then.

    Attributes:
        tracer: Makes spans of the generations, where requests are traced.
    """

    def __init__(
        self,
        *,
        engine: EngineClient,
        generator: TextGenerator,
        chains: "Callable[[], Chains]",
        cache: ResponseCache,
        screening: Screening,
        model: ModelSettings,
        usage: UsageLedger,
        security: SecuritySettings,
    ) -> None:
        self._engine = engine
        self._generator = generator
        self._chains = chains
        self._cache = cache
        self._screening = screening
        self._model = model
        self._has_own_temperature = "temperature" in model.model_fields_set
        self._usage = usage
        self.tracer: Tracer | None = None
        self._max_prompt_chars = security.max_prompt_chars

    async def open(self, job: Job) -> Answer:
        """Begin an answer; returns once the request is admitted and its prompt accepted.

        Raises:
            ServiceError: Refused; after this, reading the answer can still fail.
        """
        return await self.begin(self.screen(job))

    async def begin(self, job: Job) -> Answer:
        """What :meth:`open` does for a job that has been screened.

        Raises:
            ServiceError: Refused.
        """
        options = self._options(job)
        key = self._cache_key(job, options) if job.cache else None
        kept = await self._cache.lookup(job.caller, key)
        answer = Answer(
            self._engine.model_label,
            kept or self._cache.generate(job.caller, key, partial(self._generate, job, options)),
            cached=kept is not None,
            deadline=job.deadline,
            parser=self._parser(job.tools),
        )
        try:
            await answer.until_accepted()
        except BaseException:
            await answer.aclose()
            raise
        self._usage.add_request(job.caller)
        return answer

    def _parser(self, use: ToolUse | None) -> ToolCallParser | None:
        if use is None:
            return None
        schemas = {tool.name: tool.schema for tool in use.allowed}
        return ToolCallParser(self._generator.tool_format, schemas)

    def _cache_key(self, job: Job, options: GenerationOptions) -> str:
        info = self._engine.info
        return cache_key(
            job.caller,
            self._engine.model_label,
            (info.revision, info.chat_template, info.dtype) if info else None,
            SYSTEM_PROMPT,
            self._screening.mode,
            job.prompt,
            job.messages,
            options.max_tokens or options.default_max_tokens,
            options.sampling,
            options.stop,
            options.logprobs,
            options.grammar,
            job.tools,
            job.template_values,
            job.thinking_budget,
            job.end_user,
        )

    async def _generate(
        self, job: Job, options: GenerationOptions, flight: Flight
    ) -> GenerationReport:
        """Generate an answer into its flight; runs in the flight's task."""
        await self._usage.check(job.caller)
        report: GenerationReport | None = None
        async with self._usage.generating(job.caller):
            with self._engine.admit(job.caller, flight) as place:
                try:
                    report = await self._fill(flight, job, replace(options, place=place), place)
                    return await self._checked(report, job, options.grammar, flight.text)
                finally:
                    # A caller that leaves before the end has used the tokens generated so far.
                    used = report or place
                    if completion := used.completion_tokens:
                        self._usage.add_tokens(job.caller, used.prompt_tokens, completion)
                    if self.tracer is not None:
                        record_generation(
                            self.tracer,
                            "chat" if job.prompt is None else "text_completion",
                            self._engine.model_label,
                            options.max_tokens or options.default_max_tokens,
                            options.sampling,
                            place,
                            report or sys.exception(),
                        )

    async def _fill(
        self, flight: Flight, job: Job, options: GenerationOptions, place: Place
    ) -> GenerationReport:
        form = self._generator.tool_format if job.tools else None
        tokens = self._engine.template_tokens
        thoughts = self._screening.answer(tokens)
        if form is not None:
            tokens = tuple(token for token in tokens if not form.spells(token))
        screen = self._screening.answer(tokens, job.grammar, form.before_json if form else None)
        calls = self._parser(job.tools)
        report: GenerationReport | None = None
        is_over = False
        async with aclosing(self._stream(job, options)) as pieces:
            async for piece in pieces:
                if isinstance(piece, TextPiece):
                    flight.logprobs += piece.logprobs
                    report = piece.report
                    flight.add_reasoning(thoughts.feed(piece.reasoning))
                if piece:
                    flight.add_reasoning(thoughts.flush())
                passed = "" if thoughts.blocked else screen.feed(piece)
                flight.add(passed)
                if calls is not None:
                    calls.feed(passed)
                is_over = thoughts.blocked or screen.blocked or bool(calls and calls.repeats)
                if is_over:
                    place.finish()
                    break
        flight.add_reasoning(thoughts.flush())
        flight.add(screen.flush())
        blocked = thoughts.blocked or screen.blocked
        if blocked or is_over:
            counts = place.prompt_tokens, place.cached_tokens, place.completion_tokens
            return GenerationReport("content_filter" if blocked else "stop", *counts)
        if report is None:
            raise InternalError
        return replace(report, token_ids=()) if screen.changed else report

    async def _checked(
        self, report: GenerationReport, job: Job, grammar: Grammar | None, text: str
    ) -> GenerationReport:
        """The report of an answer, with what it breaks of the schemas that were not held."""
        is_complete = report.finish_reason == "stop"
        keywords = await self._not_held(grammar) if is_complete else frozenset()
        if not keywords:
            return report
        broken = await broken_keywords(
            schema_values(job, text, self._generator.tool_format), keywords
        )
        for keyword in broken:
            self._engine.queue.metrics.schema_violations.labels(keyword).inc()
        if broken:
            log.info("an answer breaks its schema: %s", ", ".join(broken))
        return replace(report, broken_keywords=broken)

    def _stream(self, job: Job, options: GenerationOptions) -> AsyncGenerator[str, None]:
        chains = self._chains()
        if job.prompt is not None:
            return chains.stream_text(job.prompt, options)
        return chains.stream_chat(job.messages, options, _tools_of(job), job.template_values)

    def default_sampling(self) -> dict[str, float]:
        """How a request is sampled that names nothing, by the names of :class:`SamplingParams`.

        The model's authors recommend it; a configured temperature wins over theirs.
        """
        recommended = self._engine.info.sampling if self._engine.info else {}
        temperature = {"temperature": self._model.temperature}
        if self._has_own_temperature:
            return {**DEFAULT_SAMPLING, **recommended, **temperature}
        return {**DEFAULT_SAMPLING, **temperature, **recommended}

    def answer_tokens(self, job: Job) -> int:
        """Tokens the answer may take, as far as they are known before the prompt is."""
        return job.max_tokens or self._model.max_tokens

    async def check_room(self, caller: str) -> None:
        """Refuse a caller's request now, if it would be refused when it asks for a place."""
        await self._usage.check(caller)
        self._engine.check(caller)

    async def tokenize(self, job: Job) -> tuple[list[int], int]:
        """Token ids of a prompt, and the model's context length.

        Raises:
            ServiceError: Refused, as the request itself would be.
        """
        tokens = await self.prompt_tokens(self.screen(job))
        return tokens, self._generator.info.context_length

    async def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token; a part of a character is U+FFFD."""
        tokenizer = self._generator.tokenizer
        return await tokenizer.run(tokenizer.token_texts, tokens)

    async def prompt_tokens(self, job: Job) -> list[int]:
        """Token ids of a screened job's prompt, as the model gets them."""
        if job.prompt is not None:
            return await self._generator.text_tokens(job.prompt)
        return await self._generator.chat_tokens(
            job.messages, _tools_of(job), job.template_values, job.thinking_budget
        )

    def _options(self, job: Job) -> GenerationOptions:
        if job.max_tokens is not None and job.max_tokens > self._model.max_tokens:
            raise ValidationFailedError(
                f"max_tokens: at most {self._model.max_tokens} (model.max_tokens).",
                param="max_tokens",
            )
        return GenerationOptions(
            max_tokens=job.max_tokens,
            default_max_tokens=self._model.max_tokens,
            sampling=SamplingParams(**{**self.default_sampling(), **job.sampling}),
            stop=job.stop,
            logprobs=job.logprobs,
            thinking_budget=job.thinking_budget,
            grammar=self._grammar(job.tools, job.grammar),
            with_calls=job.tools is not None,
        )

    async def not_held(self, job: Job) -> frozenset[str]:
        """The keywords of a job's schemas that its answer need not follow."""
        return await self._not_held(self._options(job).grammar)

    async def _not_held(self, grammar: Grammar | None) -> frozenset[str]:
        if grammar is None:
            return frozenset()
        return (await fit_grammar(grammar, self._generator.info))[1]

    def _grammar(self, use: ToolUse | None, text: Grammar | None) -> Grammar | None:
        """The grammar of an answer that has calls, or a text of a form."""
        if use is None:
            return text
        info = self._engine.info
        # A model that may call is held to its tools' schemas where the engine can; one that must
        # call has to be.
        if use.choice == "auto" and info is not None and "grammar" not in info.supported:
            return text
        return self._generator.tool_format.grammar(use, text)

    def screen(self, job: Job) -> Job:
        """Refuse what a caller may not send, and take out what is not to reach the model.

        Raises:
            PromptTooLongError: Over ``security.max_prompt_chars``.
            PiiDetectedError: Personal data, where that is refused.
            UnsupportedParameterError: Log-probabilities where answers are filtered.
            ModelLoadingError: Calls of tools are written in the model's own form.
        """
        if job.logprobs is not None and self._screening.takes_out:
            raise UnsupportedParameterError(
                "Log-probabilities would tell what pii.output and output.blocked_patterns take "
                "out here.",
                param="logprobs",
            )
        job = self._with_reasoning(job)
        if any("tool_calls" in m for m in job.messages):
            called = [self._with_clean_calls(m) for m in job.messages]
            job = replace(job, messages=self._generator.tool_format.as_text(called))
        self._check_length(job)
        clean = self._screening.prompt
        if job.prompt is not None:
            return replace(job, prompt=clean(job.prompt, param="prompt"))
        messages: list[ChatMessage] = [
            {**m, "content": clean(m["content"], param="messages")} for m in job.messages
        ]
        if job.tools is None:
            return replace(job, messages=messages)
        tools = tuple(
            replace(t, description=description, parameters=parameters)
            for t in job.tools.tools
            for description, parameters in [
                self._screening.values((t.description, t.parameters), param="tools")
            ]
        )
        return replace(job, messages=messages, tools=replace(job.tools, tools=tools))

    def _with_reasoning(self, job: Job) -> Job:
        """What a job asks of reasoning, in the words of the model's template."""
        if job.template_values or job.reasoning_effort is not None:
            values, budget = self._generator.tokenizer.reasoning.values(
                self._screening.values(job.template_values, param="chat_template_kwargs"),
                job.reasoning_effort,
            )
            budget = job.thinking_budget if budget is None else budget
            job = replace(
                job, template_values=values, reasoning_effort=None, thinking_budget=budget
            )
        if any("reasoning_content" in m for m in job.messages):
            job = replace(job, messages=[self._with_clean_reasoning(m) for m in job.messages])
        return job

    def _with_clean_reasoning(self, message: ChatMessage) -> ChatMessage:
        message = {**message}
        reasoning = message.pop("reasoning_content", "")
        if reasoning and self._generator.tokenizer.reasoning.is_kept:
            message["reasoning_content"] = self._screening.prompt(reasoning, param="messages")
        return message

    def _with_clean_calls(self, message: ChatMessage) -> ChatMessage:
        calls: list[ToolCall] = []
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            clean = self._screening.arguments(arguments, param="messages")
            calls.append({**call, "function": {"name": name, "arguments": clean}})
        return {**message, "tool_calls": calls} if calls else message

    def _check_length(self, job: Job) -> None:
        characters = len(job.prompt or "") + sum(
            len(m["content"]) + len(m.get("reasoning_content", "")) for m in job.messages
        )
        characters += sum(len(json.dumps(t.definition())) for t in _tools_of(job))
        if characters > self._max_prompt_chars:
            raise PromptTooLongError(
                f"The prompt has {characters} characters; at most {self._max_prompt_chars} are "
                "allowed (security.max_prompt_chars).",
                param="prompt" if job.prompt is not None else "messages",
            )


def _tools_of(job: Job) -> tuple[Tool, ...]:
    return job.tools.tools if job.tools else ()
