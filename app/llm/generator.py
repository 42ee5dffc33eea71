"""From a prompt's text to an answer's text: tokens, stop strings, log-probabilities."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from msgspec import structs

from app.llm.client.admission import Place
from app.llm.client.client import EngineClient
from app.llm.detokenizer import Detokenizer, StopMatcher
from app.llm.ebnf.check import fit_grammar, grammar_param
from app.llm.protocol import (
    NEUTRAL_SAMPLING,
    SAMPLING_FIELDS,
    EngineInfo,
    GenerationRequest,
    Grammar,
    SamplingParams,
    TokenEvent,
)
from app.llm.reasoning import Thinking
from app.llm.report import FinishReason, GenerationReport, TokenLogprob
from app.llm.system_prompt import with_system_prompt
from app.llm.tokenizer import PromptTokenizer
from app.llm.tools import ChatMessage, Tool, ToolFormat
from app.utils.errors import (
    ContextLengthExceededError,
    ModelLoadingError,
    UnsupportedParameterError,
    ValidationFailedError,
)


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """What a caller may ask of one generation.

    Attributes:
        max_tokens: Most tokens to generate; ``None`` takes ``default_max_tokens``, or what the
            context leaves if that is less.
        default_max_tokens: See ``max_tokens``.
        stop: The answer ends before the first of these strings.
        logprobs: How many of the likeliest tokens to tell beside each token and its
            log-probability; ``None`` tells neither.
        thinking_budget: Most tokens of reasoning; past them it is ended. ``None``: any number.
        place: The place that the request holds; ``None`` takes one when the prompt is ready.
    """

    max_tokens: int | None = None
    default_max_tokens: int = 512
    sampling: SamplingParams = NEUTRAL_SAMPLING
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None
    thinking_budget: int | None = None
    place: Place | None = None


class TextPiece(str):
    """A piece of an answer's text, which may be empty.

    LangChain passes strings on, so what belongs to a piece is an attribute of the string.

    Attributes:
        logprobs: Log-probabilities of the tokens that end in this piece, where they were asked for.
        reasoning: A piece of the reasoning, which is before this piece of the text.
        report: How the answer ended; on its last piece alone.
    """

    __slots__ = ("logprobs", "reasoning", "report")

    logprobs: Sequence[TokenLogprob]
    reasoning: str
    report: GenerationReport | None

    def __new__(
        cls,
        text: str,
        logprobs: Sequence[TokenLogprob] = (),
        report: GenerationReport | None = None,
        reasoning: str = "",
    ) -> Self:
        """A string with these attributes."""
        piece = super().__new__(cls, text)
        piece.logprobs, piece.report, piece.reasoning = logprobs, report, reasoning
        return piece


class TextGenerator:
    """Generates text with the engine."""

    def __init__(self, engine: EngineClient) -> None:
        self.engine = engine

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The served model's tokenizer; ``ModelLoadingError`` before it is loaded."""
        if self.engine.tokenizer is None:
            raise ModelLoadingError
        return self.engine.tokenizer

    @property
    def info(self) -> EngineInfo:
        """What is being served; ``ModelLoadingError`` before it is loaded."""
        if self.engine.info is None:
            raise ModelLoadingError
        return self.engine.info

    @property
    def tool_format(self) -> ToolFormat:
        """How the model calls tools; ``ModelLoadingError`` before it is loaded."""
        return self.tokenizer.tool_format

    async def text_tokens(self, text: str) -> list[int]:
        """Token ids of a bare prompt."""
        return await self.tokenizer.run(self.tokenizer.encode_text, text)

    async def chat_tokens(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], values: Mapping[str, Any]
    ) -> list[int]:
        """Token ids of a chat's prompt, the system message that stands before it included.

        Raises:
            ModelLoadingError: The model has not been loaded yet.
            ChatTemplateError: The model's template refuses the messages.
        """
        encode = self.tokenizer.encode_chat
        return await self.tokenizer.run(encode, with_system_prompt(messages), tools, values)

    async def stream(
        self, prompt: str, options: GenerationOptions
    ) -> AsyncGenerator[TextPiece, None]:
        """Generate, and yield the answer in pieces; the last one has the report.

        Args:
            prompt: Bare text, or what :meth:`PromptTokenizer.chat_prompt` returned.
            options: What the caller asks.

        Raises:
            ServiceError: See :meth:`EngineClient.admit` and :meth:`Place.events`, and
                ``ContextLengthExceededError``, ``UnsupportedParameterError``,
                ``InvalidGrammarError``.
        """
        if options.place is None:
            with self.engine.admit() as place:
                async for piece in self.stream(prompt, replace(options, place=place)):
                    yield piece
            return
        place = options.place
        check_supported(options, self.info)
        if options.grammar is not None:
            grammar, _ = await fit_grammar(options.grammar, self.info)
            options = replace(options, grammar=grammar)
        thinking = self.tokenizer.thinking(
            prompt, budget=options.thinking_budget, gated=options.grammar is not None
        )
        if thinking is not None and thinking.is_due:
            prompt += thinking.turn()[1]
        request = await self._prepare(prompt, options, place.id)
        gated = thinking is not None and thinking.gated
        place.start(structs.replace(request, grammar=None) if gated else request)
        text = AnswerText(self.tokenizer, options, place, thinking)
        while text.report is None:
            for event in await place.events():
                piece = text.add(event)
                if text.stopped:
                    place.finish()
                yield piece
                if piece.report is not None:
                    break
                if thinking is not None and thinking.is_due:
                    rest = await self._behind_reasoning(request, text, thinking)
                    if rest.max_tokens < 1:
                        place.finish()
                        yield text.cut_off()
                    else:
                        place.go_on(rest)
                    break

    async def _behind_reasoning(
        self, request: GenerationRequest, text: "AnswerText", thinking: Thinking
    ) -> GenerationRequest:
        """The request for what follows the reasoning: its prompt has the reasoning.

        The engine finds most of the prompt in its cache.
        """
        keeps, behind = thinking.turn()
        ids = await self.tokenizer.run(self.tokenizer.encode_rendered, behind) if behind else []
        said = text.begin_text([*(text.token_ids if keeps else ()), *ids])
        return structs.replace(
            request,
            id=f"{request.id}-text",
            prompt_token_ids=[*request.prompt_token_ids, *said],
            max_tokens=request.max_tokens - len(said),
        )

    async def _prepare(
        self, prompt: str, options: GenerationOptions, request_id: str
    ) -> GenerationRequest:
        ids = await self.tokenizer.run(self.tokenizer.encode, prompt)
        if not ids:
            raise ValidationFailedError("The prompt has no tokens.", param="prompt")
        if max(options.sampling.logit_bias, default=0) >= self.info.vocabulary_size:
            raise ValidationFailedError(
                f"logit_bias: token ids are below {self.info.vocabulary_size} for this model.",
                param="logit_bias",
            )
        return GenerationRequest(
            id=request_id,
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


class AnswerText:
    """The text of one answer, made from its tokens as they come.

    Attributes:
        report: How the answer ended, once it has.
        stopped: Whether a stop string ended it, of which the engine does not know.
        token_ids: Its tokens so far.
    """

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        options: GenerationOptions,
        place: Place,
        thinking: Thinking | None = None,
    ) -> None:
        self.report: GenerationReport | None = None
        self.stopped = False
        self.token_ids: list[int] = []
        self._tokenizer = tokenizer
        self._with_logprobs = options.logprobs is not None
        self._detokenizer = Detokenizer(tokenizer.decoder)
        self._stops = StopMatcher(options.stop)
        self._thinking = thinking
        self._reasoning_stops = StopMatcher(options.stop)
        # The text's first token.
        self._text_begin = 0
        self._has_text = thinking is None
        self._place = place
        # Characters decoded, and how many of them were passed on: the rest may be a stop string.
        self._decoded = self._passed = 0
        self._logprobs: list[TokenLogprob] = []

    def add(self, event: TokenEvent) -> TextPiece:
        """The text that an event's tokens complete.

        Tokens behind the one at which the reasoning is due to end are left out.
        """
        if self._thinking is None:
            texts, reasoning = [self._detokenizer.feed([token]) for token in event.token_ids], ""
            self.token_ids += event.token_ids
        else:
            texts, reasoning = self._split(event, self._thinking)
        if self._with_logprobs:
            self._note_logprobs(event, texts)
        text = ""
        if not self.stopped:
            text, self.stopped = self._stops.feed("".join(texts))
        is_due = self._thinking is not None and self._thinking.is_due
        ended = event.finish_reason is not None and not (self.stopped or is_due)
        if ended:
            text += self._stops.flush()
        self._passed += len(text)
        if ended or self.stopped:
            is_cut = ended and event.finish_reason == "length"
            self.report = self._make_report("length" if is_cut else "stop")
        # The tokens of a stop string are not in the text; at a natural end all tokens are.
        logprobs = self._logprobs if ended else self._take_logprobs()
        return TextPiece(text, logprobs, self.report, reasoning)

    def _split(self, event: TokenEvent, thinking: Thinking) -> tuple[list[str], str]:
        """The text of each token of an event, and the reasoning that they complete."""
        texts: list[str] = []
        reasoning = ""
        for token in event.token_ids:
            marker = self._tokenizer.marker_tokens.get(token)
            thought, text = thinking.add(marker or self._detokenizer.feed([token]))
            reasoning += thought
            if thinking.is_due:
                text = ""
            elif not text and not self._has_text:
                self._text_begin = len(self.token_ids) + 1
            self._has_text = self._has_text or bool(text)
            self.token_ids.append(token)
            texts.append(text)
            if thinking.is_due:
                break
        if event.finish_reason is not None and not thinking.is_due:
            thought, text = thinking.flush()
            reasoning += thought
            texts[-1:] = [*texts[-1:], text]
        reasoning, self.stopped = self._reasoning_stops.feed(reasoning)
        if not (thinking.inside or self.stopped):
            reasoning += self._reasoning_stops.flush()
        return texts, reasoning

    def begin_text(self, token_ids: list[int]) -> list[int]:
        """Take these for the answer's tokens so far, behind which the text begins."""
        self.token_ids = token_ids
        self._text_begin = len(token_ids)
        self._detokenizer = Detokenizer(self._tokenizer.decoder)
        return token_ids

    def cut_off(self) -> TextPiece:
        """The last piece of an answer that has no room for its text."""
        self.report = self._make_report("length")
        return TextPiece("", (), self.report)

    def _make_report(self, reason: FinishReason) -> GenerationReport:
        return GenerationReport(
            finish_reason=reason,
            prompt_tokens=self._place.prompt_tokens,
            cached_tokens=self._place.cached_tokens,
            completion_tokens=len(self.token_ids),
            reasoning_tokens=self._thinking.tokens if self._thinking else 0,
            token_ids=() if self.stopped else self._exact_tokens(),
        )

    def _note_logprobs(self, event: TokenEvent, texts: Sequence[str]) -> None:
        """Keep an event's log-probabilities; special tokens are not in the text."""
        bytes_of = self._tokenizer.token_bytes
        top = event.top_logprobs or [[]] * len(event.token_ids)
        for token, logprob, text, likeliest in zip(
            event.token_ids, event.logprobs, texts, top, strict=False
        ):
            if token not in self._tokenizer.special_token_ids and not self._reasons_at(text):
                told = tuple((bytes_of(t), p) for t, p in likeliest)
                self._logprobs.append(TokenLogprob(bytes_of(token), logprob, self._decoded, told))
            self._decoded += len(text)

    def _reasons_at(self, text: str) -> bool:
        """Whether a token without text is one of the reasoning, or of its markers."""
        return self._thinking is not None and not (self._has_text or text)

    def _take_logprobs(self) -> list[TokenLogprob]:
        """Those of tokens whose text has begun to be passed on."""
        count = sum(entry.start < self._passed for entry in self._logprobs)
        taken, self._logprobs = self._logprobs[:count], self._logprobs[count:]
        return taken

    def _exact_tokens(self) -> tuple[int, ...]:
        """The text's tokens; none where a special token stands in the middle of the text."""
        special = self._tokenizer.special_token_ids
        ids = self.token_ids[self._text_begin :]
        if ids and ids[-1] in special:
            ids = ids[:-1]
        return tuple(ids) if special.isdisjoint(ids) else ()


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
    if options.grammar is not None and options.sampling.min_tokens:
        raise UnsupportedParameterError(
            "min_tokens and ignore_eos are not supported beside response_format or tools.",
            param="min_tokens",
        )
    if options.grammar is not None and "grammar" not in info.supported:
        raise UnsupportedParameterError(
            f"The running engine ({info.backend}) cannot hold an answer to a form.",
            param=grammar_param(options.grammar),
        )
