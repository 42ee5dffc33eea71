"""From a prompt's text to an answer's text: admission, tokens, stop strings, accounting."""

import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from app.llm.detokenizer import Detokenizer, StopMatcher
from app.llm.engine.admission import Place
from app.llm.engine.base import (
    NEUTRAL_SAMPLING,
    SAMPLING_FIELDS,
    EngineInfo,
    GenerationRequest,
    Grammar,
    SamplingParams,
    TokenEvent,
)
from app.llm.engine.client import EngineClient
from app.llm.grammar import check_grammar, grammar_param
from app.llm.system_prompt import with_system_prompt
from app.llm.tokenizer import PromptTokenizer
from app.llm.tools import ChatMessage, Tool, ToolFormat
from app.utils.errors import (
    ContextLengthExceededError,
    ModelLoadingError,
    UnsupportedParameterError,
    ValidationFailedError,
)

FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """What a caller may ask of one generation.

    Attributes:
        max_tokens: Most tokens to generate; ``None`` takes ``default_max_tokens``, or what the
            context leaves if that is less.
        default_max_tokens: See ``max_tokens``.
        sampling: How tokens are chosen.
        stop: The answer ends before the first of these strings.
        logprobs: How many of the likeliest tokens to tell beside each token and its
            log-probability; ``None`` tells neither.
        grammar: What the answer must look like.
    """

    max_tokens: int | None = None
    default_max_tokens: int = 512
    sampling: SamplingParams = NEUTRAL_SAMPLING
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability.

    Attributes:
        token: Its bytes; a character of the text may span several tokens.
        logprob: Natural logarithm of its probability, by the model alone.
        start: Where in the text it begins, in characters.
        top: The likeliest tokens of its place and their log-probabilities, likeliest first.
    """

    token: bytes
    logprob: float
    start: int
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(slots=True)
class GenerationReport:
    """What is known of a generation beside its text; filled while it runs.

    Attributes:
        id: Also the id of the request in the engine, and so in its log.
        prompt_tokens: Tokens of the prompt.
        cached_tokens: How many of them were in the KV cache.
        completion_tokens: Tokens generated, the end-of-sequence token included.
        finish_reason: ``None`` until the answer is complete.
        token_ids: The answer's tokens without the one that ended it; empty where they are not
            exactly the text, as after a stop string.
        logprobs: Of the text's tokens, where they were asked for.
    """

    id: str = field(default_factory=lambda: f"gen-{uuid.uuid4().hex}")
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: FinishReason | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class TextGenerator:
    """Generates text with the engine."""

    def __init__(self, engine: EngineClient) -> None:
        self.engine = engine

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The served model's tokenizer.

        Raises:
            ModelLoadingError: The model has not been loaded yet.
        """
        if self.engine.tokenizer is None:
            raise ModelLoadingError
        return self.engine.tokenizer

    @property
    def info(self) -> EngineInfo:
        """What is being served.

        Raises:
            ModelLoadingError: The model has not been loaded yet.
        """
        if self.engine.info is None:
            raise ModelLoadingError
        return self.engine.info

    @property
    def tool_format(self) -> ToolFormat:
        """How the model calls tools.

        Raises:
            ModelLoadingError: The model has not been loaded yet.
        """
        return self.tokenizer.tool_format

    async def text_tokens(self, text: str) -> list[int]:
        """Token ids of a bare prompt.

        Raises:
            ModelLoadingError: The model has not been loaded yet.
        """
        return await self.tokenizer.run(self.tokenizer.encode_text, text)

    async def chat_tokens(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()
    ) -> list[int]:
        """Token ids of a chat's prompt, the system message that stands before it included.

        Raises:
            ModelLoadingError: The model has not been loaded yet.
            ChatTemplateError: The model's template refuses the messages.
        """
        encode = self.tokenizer.encode_chat
        return await self.tokenizer.run(encode, with_system_prompt(messages), tools)

    async def stream(
        self,
        prompt: str,
        options: GenerationOptions,
        report: GenerationReport,
        *,
        rendered: bool = False,
        admission: Place | None = None,
    ) -> AsyncGenerator[str, None]:
        """Generate, and yield the answer in pieces.

        The first piece is empty and comes as soon as the request is accepted, before any token:
        from then on it can only fail for reasons of the service.

        Args:
            prompt: Bare text, or what :meth:`PromptTokenizer.render_chat` returned.
            options: What the caller asks.
            report: Filled on the way; complete after the last piece.
            rendered: Whether ``prompt`` comes from a chat template.
            admission: A place taken before; otherwise one is taken here.

        Raises:
            ServiceError: See :meth:`EngineClient.admit` and :meth:`Place.events`, and
                ``ContextLengthExceededError``, ``UnsupportedParameterError``,
                ``InvalidGrammarError``.
        """
        check_supported(options, self.info)
        if options.grammar is not None:
            await check_grammar(options.grammar, self.info)
        place = admission or self.engine.admit()
        try:
            request = await self._prepare(prompt, options, report, rendered=rendered)
            place.start(request)
            yield ""
            pieces = self._pieces(place, request, options.stop, report)
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece
        finally:
            if admission is None:
                place.release()

    async def _prepare(
        self, prompt: str, options: GenerationOptions, report: GenerationReport, *, rendered: bool
    ) -> GenerationRequest:
        tokenizer = self.tokenizer
        encode = tokenizer.encode_rendered if rendered else tokenizer.encode_text
        ids = await tokenizer.run(encode, prompt)
        if not ids:
            raise ValidationFailedError("The prompt has no tokens.", param="prompt")
        if max(options.sampling.logit_bias, default=0) >= self.info.vocabulary_size:
            raise ValidationFailedError(
                f"logit_bias: token ids are below {self.info.vocabulary_size} for this model.",
                param="logit_bias",
            )
        report.prompt_tokens = len(ids)
        return GenerationRequest(
            id=report.id,
            prompt_token_ids=ids,
            max_tokens=self._fit(len(ids), options),
            sampling=options.sampling,
            logprobs=options.logprobs is not None,
            top_logprobs=options.logprobs or 0,
            grammar=options.grammar,
        )

    def _fit(self, prompt_tokens: int, options: GenerationOptions) -> int:
        """How many tokens may be generated.

        Raises:
            ContextLengthExceededError: Prompt and answer do not fit the model's context.
        """
        context_length = self.info.context_length
        room = context_length - prompt_tokens
        asked = options.max_tokens or max(1, min(options.default_max_tokens, room))
        if asked > room:
            raise ContextLengthExceededError(
                prompt_tokens=prompt_tokens, max_tokens=asked, context_length=context_length
            )
        return asked

    async def _pieces(
        self,
        place: Place,
        request: GenerationRequest,
        stop: tuple[str, ...],
        report: GenerationReport,
    ) -> AsyncGenerator[str, None]:
        detokenizer = Detokenizer(self.tokenizer.decoder)
        stops = StopMatcher(stop)
        position = sent = 0
        while report.finish_reason is None:
            for event in await place.events():
                report.completion_tokens += len(event.token_ids)
                report.token_ids += event.token_ids
                report.cached_tokens += event.cached_tokens
                texts = [detokenizer.feed([token]) for token in event.token_ids]
                if request.logprobs:
                    starts = accumulate(map(len, texts), initial=position)
                    report.logprobs += self._logprobs(event, starts)
                    position += sum(map(len, texts))
                piece, stopped = stops.feed("".join(texts))
                sent += len(piece)
                if stopped:
                    while report.logprobs and report.logprobs[-1].start >= sent:
                        del report.logprobs[-1]
                    report.finish_reason = "stop"
                    report.token_ids.clear()
                    place.finish()
                    yield piece
                    return
                if event.finish_reason is not None:
                    report.finish_reason = "length" if event.finish_reason == "length" else "stop"
                    piece += stops.flush()
                    self._keep_exact(report)
                if piece:
                    yield piece

    def _logprobs(self, event: TokenEvent, starts: Iterable[int]) -> Iterator[TokenLogprob]:
        """An event's log-probabilities, but for special tokens: they are not in the text."""
        bytes_of = self.tokenizer.token_bytes
        top = event.top_logprobs or [[]] * len(event.token_ids)
        rows = zip(event.token_ids, event.logprobs, starts, top, strict=False)
        for token, logprob, start, likeliest in rows:
            if token not in self.tokenizer.special_token_ids:
                told = tuple((bytes_of(t), p) for t, p in likeliest)
                yield TokenLogprob(bytes_of(token), logprob, start, told)

    def _keep_exact(self, report: GenerationReport) -> None:
        """Leave out the end-of-sequence token; give up where a special token is in the text."""
        special = self.tokenizer.special_token_ids
        if report.token_ids and report.token_ids[-1] in special:
            report.token_ids.pop()
        if not special.isdisjoint(report.token_ids):
            report.token_ids.clear()


def check_supported(options: GenerationOptions, info: EngineInfo) -> None:
    """Refuse what the running backend would ignore.

    Raises:
        UnsupportedParameterError: Naming the first such field.
    """
    asked = [
        name
        for name in SAMPLING_FIELDS
        if getattr(options.sampling, name) != getattr(NEUTRAL_SAMPLING, name)
    ]
    if options.logprobs is not None:
        asked.append("top_logprobs" if options.logprobs else "logprobs")
    for name in asked:
        if name not in info.supported:
            raise UnsupportedParameterError(
                f"The running engine ({info.backend}) does not support {name}.", param=name
            )
    if options.grammar is not None and "grammar" not in info.supported:
        raise UnsupportedParameterError(
            f"The running engine ({info.backend}) cannot hold an answer to a form.",
            param=grammar_param(options.grammar),
        )
