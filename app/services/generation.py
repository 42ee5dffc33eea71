"""The one use case behind every route that generates: check, admit, generate, account."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from app.core.cache import CacheStatistics
from app.core.config import ModelSettings, SecuritySettings
from app.llm.chain import Chains, ChatMessage
from app.llm.engine.base import SamplingParams
from app.llm.engine.client import EngineClient
from app.llm.generator import FinishReason, GenerationOptions, GenerationReport
from app.services.response_cache import ResponseCache, cache_key
from app.services.screening import Screening
from app.utils.errors import InternalError, PromptTooLongError, ValidationFailedError
from app.utils.timing import within


@dataclass(frozen=True, slots=True)
class Completion:
    """A complete answer.

    Attributes:
        id: Of this answer.
        text: What the model said.
        model: Which model said it.
        finish_reason: Why it ended.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens generated.
        cached_tokens: Prompt tokens found in the engine's KV cache.
        cached: Whether the whole answer came from the response cache.
        dropped_messages: Messages of the history that did not fit the context.
        token_ids: The answer's tokens, where they are exactly its text; see GenerationReport.
    """

    id: str
    text: str
    model: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cached: bool = False
    dropped_messages: int = 0
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """What a caller wants generated; either a prompt or messages.

    Attributes:
        prompt: Bare text to continue.
        messages: A chat to answer, each with ``role`` and ``content``.
        max_tokens: Most tokens, or ``None`` for the configured number.
        temperature: Sampling temperature, or ``None`` for the configured one.
        sampling: The other sampling fields that the caller set.
        stop: Strings that end the answer.
        caller: Id of the caller's key; answers are kept for each caller apart, and callers
            share the engine fairly.
        cache: Whether a kept answer may be served, and this one kept.
        deadline: When the answer must be complete, on the event loop's clock.
    """

    prompt: str | None = None
    messages: Sequence[ChatMessage] = ()
    max_tokens: int | None = None
    temperature: float | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    caller: str = ""
    cache: bool = True
    deadline: float | None = None


class Answer:
    """An answer on its way: iterate over its text, then read :attr:`completion`."""

    def __init__(
        self,
        model: str,
        report: GenerationReport,
        pieces: AsyncGenerator[str, None],
        *,
        cached: bool = False,
        deadline: float | None = None,
    ) -> None:
        self.id = report.id
        self.model = model
        self.cached = cached
        self._deadline = deadline
        self.dropped_messages = 0
        self._on_end: Callable[[Completion | None], None] | None = None
        self._report = report
        self._pieces = pieces
        self._text: list[str] = []

    async def __aiter__(self) -> AsyncIterator[str]:
        """The answer's text, piece by piece.

        Raises:
            ServiceError: The answer broke off.
        """
        # The deadline is this reader's alone: a generation may have others, see ResponseCache.
        while (piece := await within(self._deadline, anext(self._pieces, None))) is not None:
            if piece:
                self._text.append(piece)
                yield piece
        self._end(self.completion)

    def on_end(self, callback: Callable[[Completion | None], None]) -> None:
        """Call ``callback`` once: with the whole answer, or with ``None`` if there is none."""
        self._on_end = callback

    def _end(self, completion: Completion | None) -> None:
        callback, self._on_end = self._on_end, None
        if callback is not None:
            callback(completion)

    async def aclose(self) -> None:
        """Stop generating, if it has not ended; must be called in any case."""
        try:
            await self._pieces.aclose()
        finally:
            self._end(None)

    @property
    def completion(self) -> Completion:
        """The whole answer, once the iteration has ended.

        Raises:
            InternalError: It has not.
        """
        report = self._report
        if report.finish_reason is None:
            raise InternalError
        return Completion(
            id=self.id,
            text="".join(self._text),
            model=self.model,
            finish_reason=report.finish_reason,
            prompt_tokens=report.prompt_tokens,
            completion_tokens=report.completion_tokens,
            cached_tokens=report.cached_tokens,
            cached=self.cached,
            dropped_messages=self.dropped_messages,
            token_ids=tuple(report.token_ids),
        )


class GenerationService:
    """Generates answers for every router and for the command line."""

    def __init__(
        self,
        *,
        engine: EngineClient,
        chains: Chains,
        cache: ResponseCache,
        screening: Screening,
        model: ModelSettings,
        security: SecuritySettings,
    ) -> None:
        self._engine = engine
        self._chains = chains
        self._cache = cache
        self._screening = screening
        self._model = model
        self._max_prompt_chars = security.max_prompt_chars

    async def complete(self, job: Job) -> Completion:
        """Generate a whole answer.

        Raises:
            ServiceError: Refused or failed.
        """
        return await collect(await self.open(job))

    async def open(self, job: Job) -> Answer:
        """Begin an answer; returns once the request is admitted and its prompt accepted.

        Raises:
            ServiceError: Refused; after this, the answer's iteration can still fail.
        """
        return await self.begin(self.screen(job))

    async def begin(self, job: Job) -> Answer:
        """What :meth:`open` does for a job that has been screened.

        Raises:
            ServiceError: Refused.
        """
        options = self._options(job)
        key = self._cache_key(job, options) if job.cache else None
        model = self._engine.model_label
        if stored := self._cache.lookup(key):
            return Answer(model, stored.report, _all_at_once(stored.text), cached=True)
        report, pieces = self._cache.generate(key, partial(self._generate, job, options))
        try:
            # The first piece is empty and says that the request is in.
            await within(job.deadline, anext(pieces))
        except BaseException:
            await pieces.aclose()
            raise
        return Answer(model, report, pieces, deadline=job.deadline)

    def _cache_key(self, job: Job, options: GenerationOptions) -> str:
        info = self._engine.info
        return cache_key(
            job.caller,
            self._engine.model_label,
            (info.revision, info.chat_template, info.dtype) if info else None,
            self._chains.system_prompt,
            self._screening.mode,
            job.prompt,
            job.messages,
            options.max_tokens or options.default_max_tokens,
            options.sampling,
            options.stop,
        )

    async def _generate(
        self, job: Job, options: GenerationOptions, report: GenerationReport
    ) -> AsyncGenerator[str, None]:
        admission = self._engine.admit(job.caller)
        try:
            if job.prompt is not None:
                chain = self._chains.generate(options, report, admission)
                pieces = chain.astream({"prompt": job.prompt})
            else:
                chain = self._chains.chat(options, report, admission)
                pieces = chain.astream({"messages": self._chains.chat_messages(job.messages)})
            screened = self._screening.answer(pieces, report, self._engine.template_tokens)
            # Up to the first, empty piece the prompt is rendered and encoded.
            yield await admission.prepare(anext(screened))
            async for piece in screened:
                yield piece
            if report.finish_reason == "content_filter":
                admission.finish()
        finally:
            # LangChain closes its inner generators when it gets to it; the place is freed now.
            admission.release()

    def cache_statistics(self) -> CacheStatistics:
        """How the response cache is doing."""
        return self._cache.statistics()

    def answer_tokens(self, job: Job) -> int:
        """Tokens the answer may take, as far as they are known before the prompt is."""
        return job.max_tokens or self._model.max_tokens

    def check_room(self, caller: str) -> None:
        """Refuse now what would be refused when it asks for a place.

        Args:
            caller: Whose request it would be.

        Raises:
            ServiceError: See :meth:`EngineClient.admit`.
        """
        self._engine.check(caller)

    async def count_chat_tokens(self, messages: Sequence[ChatMessage]) -> int:
        """Tokens of a chat's prompt."""
        return await self._chains.count_tokens(messages)

    def _options(self, job: Job) -> GenerationOptions:
        if job.max_tokens is not None and job.max_tokens > self._model.max_tokens:
            raise ValidationFailedError(
                f"max_tokens: at most {self._model.max_tokens} (model.max_tokens).",
                param="max_tokens",
            )
        temperature = self._model.temperature if job.temperature is None else job.temperature
        return GenerationOptions(
            max_tokens=job.max_tokens,
            default_max_tokens=self._model.max_tokens,
            sampling=SamplingParams(temperature=temperature, **job.sampling),
            stop=job.stop,
        )

    def screen(self, job: Job) -> Job:
        """Refuse what a caller may not send, and take out what is not to reach the model.

        Raises:
            PromptTooLongError: Over ``security.max_prompt_chars``.
            PiiDetectedError: Personal data, where that is refused.
        """
        self._check_length(job)
        clean = self._screening.prompt
        if job.prompt is not None:
            return replace(job, prompt=clean(job.prompt, param="prompt"))
        messages: list[ChatMessage] = [
            {**m, "content": clean(m["content"], param="messages")} for m in job.messages
        ]
        return replace(job, messages=messages)

    def _check_length(self, job: Job) -> None:
        characters = len(job.prompt or "") + sum(len(m["content"]) for m in job.messages)
        if characters > self._max_prompt_chars:
            raise PromptTooLongError(
                f"The prompt has {characters} characters; at most {self._max_prompt_chars} are "
                "allowed (security.max_prompt_chars).",
                param="prompt" if job.prompt is not None else "messages",
            )


async def collect(answer: Answer) -> Completion:
    """Wait for the whole answer.

    Raises:
        ServiceError: It broke off.
    """
    try:
        async for _ in answer:
            pass
        return answer.completion
    finally:
        await answer.aclose()


async def _all_at_once(text: str) -> AsyncGenerator[str, None]:
    yield text
