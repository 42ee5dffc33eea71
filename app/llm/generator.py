"""From a prompt's text to an answer's text: tokens, stop strings, log-probabilities."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from msgspec import structs

from app.llm.answer_text import AnswerText, TextPiece
from app.llm.client.client import EngineClient
from app.llm.client.place import Place
from app.llm.ebnf.check import fit_grammar, grammar_param
from app.llm.protocol import (
    NEUTRAL_SAMPLING,
    SAMPLING_FIELDS,
    EngineInfo,
    GenerationRequest,
    Grammar,
    SamplingParams,
)
from app.llm.reasoning import Thinking
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
        with_calls: Whether the text may have calls of tools.
        place: The place that the request holds; ``None`` takes one when the prompt is ready.
    """

    max_tokens: int | None = None
    default_max_tokens: int = 512
    sampling: SamplingParams = NEUTRAL_SAMPLING
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None
    thinking_budget: int | None = None
    with_calls: bool = False
    place: Place | None = None


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
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool],
        values: Mapping[str, Any],
        thinking_budget: int | None,
    ) -> list[int]:
        """Token ids of a chat's prompt, the system message that stands before it included.

        Raises:
            ModelLoadingError: The model has not been loaded yet.
            ChatTemplateError: The model's template refuses the messages.
        """

        def encode() -> list[int]:
            prompt = self.tokenizer.chat_prompt(with_system_prompt(messages), tools, values)
            return self.tokenizer.encode(self._begun(prompt, thinking_budget)[0])

        return await self.tokenizer.run(encode)

    def _begun(
        self, prompt: str, budget: int | None, *, gated: bool = False, with_calls: bool = False
    ) -> tuple[str, Thinking | None]:
        """A prompt as the engine gets it, and what finds the reasoning in its answer.

        Reasoning that the template has opened is ended there, where none is allowed.
        """
        thinking = self.tokenizer.thinking(
            prompt, budget=budget, gated=gated, with_calls=with_calls
        )
        if thinking is not None and thinking.is_due:
            prompt += thinking.turn(self.tokenizer.special_token_ids)
        return prompt, thinking

    async def stream(
        self, prompt: str, options: GenerationOptions
    ) -> AsyncGenerator[TextPiece, None]:
        """Generate, and yield the answer in pieces; the last one has the report.

        The prompt is bare text, or what :meth:`PromptTokenizer.chat_prompt` returned.

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
        request, text = await self._start(prompt, options, place)
        while text.report is None:
            for event in await place.events():
                piece = text.add(event)
                if text.stopped:
                    place.finish()
                yield piece
                if text.is_due:
                    if not await self._go_on(request, text, place):
                        place.finish("length")
                        yield text.cut_off()
                    break
                if piece.report is not None:
                    break

    async def _start(
        self, prompt: str, options: GenerationOptions, place: Place
    ) -> tuple[GenerationRequest, AnswerText]:
        """Start the place; returns the request of the answer's text."""
        check_supported(options, self.info)
        if options.grammar is not None:
            grammar, _ = await fit_grammar(options.grammar, self.info)
            options = replace(options, grammar=grammar)
        tokenizer = self.tokenizer
        prompt, thinking = self._begun(
            prompt,
            options.thinking_budget,
            gated=options.grammar is not None,
            with_calls=options.with_calls,
        )
        text = AnswerText(
            tokenizer,
            place,
            options.stop,
            with_logprobs=options.logprobs is not None,
            thinking=thinking,
            with_calls=options.with_calls,
        )
        request = await self._prepare(prompt, options, place.id)
        gated = thinking is not None and thinking.gated
        place.start(structs.replace(request, grammar=None) if gated else request)
        return request, text

    async def _go_on(self, request: GenerationRequest, text: AnswerText, place: Place) -> bool:
        """Ask the engine for what follows the reasoning; ``False`` where no token is left for it.

        The prompt has the reasoning, most of which the engine finds in its cache.
        """
        said, behind = text.turn()
        if behind:
            said += await self.tokenizer.run(self.tokenizer.encode_rendered, behind)
        left = request.max_tokens - len(said)
        if left < 1:
            return False
        sampling = request.sampling
        least = max(0, sampling.min_tokens - len(said))
        place.go_on(
            structs.replace(
                request,
                id=f"{request.id}-text",
                prompt_token_ids=request.prompt_token_ids + said,
                max_tokens=left,
                sampling=structs.replace(sampling, min_tokens=least),
            )
        )
        return True

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
