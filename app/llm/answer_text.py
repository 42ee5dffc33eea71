"""The text of an answer, made from its tokens: decoding, reasoning, stop strings, probabilities."""

from collections.abc import Sequence
from typing import Self

from app.llm.client.place import Place
from app.llm.detokenizer import Detokenizer, StopMatcher
from app.llm.protocol import TokenEvent
from app.llm.reasoning import Thinking
from app.llm.report import FinishReason, GenerationReport, TokenLogprob
from app.llm.tokenizer import PromptTokenizer


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


class AnswerText:
    """The text of one answer, made from its tokens as they come.

    The answer ends before the first ``stop`` string in its reasoning or in its text. ``with_calls``
    makes special tokens that mark calls of tools a part of the text.

    Attributes:
        report: How the answer ended, once it has.
        stopped: Whether a stop string ended it, of which the engine does not know.
    """

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        place: Place,
        stop: Sequence[str],
        *,
        with_logprobs: bool,
        thinking: Thinking | None,
        with_calls: bool = False,
    ) -> None:
        self.report: GenerationReport | None = None
        self.stopped = False
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        self._detokenizer = Detokenizer(tokenizer.decoder)
        self._stops = StopMatcher(stop)
        self._thinking = thinking
        self._marks = tokenizer.call_marks if with_calls else {}
        self._reasoning_stops = StopMatcher(stop)
        self._place = place
        self._token_ids: list[int] = []
        # Characters decoded, and how many of them were passed on: the rest may be a stop string.
        self._decoded = self._passed = 0
        self._logprobs: list[TokenLogprob] = []

    def add(self, event: TokenEvent) -> TextPiece:
        """The text that an event's tokens complete, and the reasoning before it."""
        texts = [
            self._detokenizer.feed([token]) or self._marks.get(token, "")
            for token in event.token_ids
        ]
        reasoning = text = ""
        if self._thinking is not None and not self._thinking.has_text:
            reasoning, event, texts = self._reason(self._thinking, event, texts)
        self._token_ids += event.token_ids
        if self._with_logprobs:
            self._note_logprobs(event, texts)
        if not self.stopped:
            text, self.stopped = self._stops.feed("".join(texts))
        ended = event.finish_reason is not None and not (self.stopped or self.is_due)
        if ended:
            text += self._stops.flush()
        self._passed += len(text)
        if ended or self.stopped:
            is_cut = ended and event.finish_reason == "length"
            self.report = self._make_report("length" if is_cut else "stop")
        # The tokens of a stop string are not in the text; at a natural end all tokens are.
        logprobs = self._logprobs if ended else self._take_logprobs()
        return TextPiece(text, logprobs, self.report, reasoning)

    def _reason(
        self, thinking: Thinking, event: TokenEvent, texts: list[str]
    ) -> tuple[str, TokenEvent, list[str]]:
        """See :meth:`Thinking.split`; the reasoning ends before a stop string."""
        reasoning, event, texts = thinking.split(event, texts)
        reasoning, self.stopped = self._reasoning_stops.feed(reasoning)
        if self.stopped:
            return reasoning, event, []
        if thinking.is_over or thinking.is_due or event.finish_reason is not None:
            reasoning += self._reasoning_stops.flush()
        return reasoning, event, texts

    @property
    def is_due(self) -> bool:
        """Whether the engine is to go on with another request; see :class:`Thinking`."""
        return self._thinking is not None and self._thinking.is_due and not self.stopped

    def turn(self) -> tuple[list[int], str]:
        """The answer's tokens so far, and what follows them in the next request's prompt.

        The text of that request's answer is the answer's text.
        """
        assert self._thinking is not None  # noqa: S101 - one is due  # nosec B101
        self._detokenizer = Detokenizer(self._tokenizer.decoder)
        behind = self._thinking.turn(self._tokenizer.special_token_ids)
        return self._thinking.token_ids, behind

    def cut_off(self) -> TextPiece:
        """The last piece of an answer that has no room for its text."""
        self.report = self._make_report("length")
        return TextPiece("", (), self.report)

    def _make_report(self, reason: FinishReason) -> GenerationReport:
        return GenerationReport(
            finish_reason=reason,
            prompt_tokens=self._place.prompt_tokens,
            cached_tokens=self._place.cached_tokens,
            completion_tokens=len(self._token_ids)
            + (len(self._thinking.token_ids) if self._thinking else 0),
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
            if token not in self._tokenizer.special_token_ids:
                told = tuple((bytes_of(t), p) for t, p in likeliest)
                self._logprobs.append(TokenLogprob(bytes_of(token), logprob, self._decoded, told))
            self._decoded += len(text)

    def _take_logprobs(self) -> list[TokenLogprob]:
        """Those of tokens whose text has begun to be passed on."""
        count = sum(entry.start < self._passed for entry in self._logprobs)
        taken, self._logprobs = self._logprobs[:count], self._logprobs[count:]
        return taken

    def _exact_tokens(self) -> tuple[int, ...]:
        """The text's tokens; none where a special token stands in the middle of the text."""
        special = self._tokenizer.special_token_ids
        ids = self._token_ids
        if ids and ids[-1] in special:
            ids = ids[:-1]
        return tuple(ids) if special.isdisjoint(ids) else ()
