"""What may reach the model and what may leave it: personal data, blocked patterns, stray tokens."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

from app.core.config import OutputSettings, PiiSettings
from app.core.metrics import Metrics
from app.core.output_filter import OutputFilter, StreamFilter
from app.core.pii.scanner import PiiScanner, StreamRedactor
from app.llm.protocol import ANY_OBJECT, Grammar, JsonSchemaGrammar
from app.services.json_screen import CallsScreen, JsonScreen, TextScreen
from app.utils.errors import ConfigurationError, PiiDetectedError


class Screening:
    """The rules of this service, applied to prompts and to answers on their way."""

    def __init__(self, pii: PiiSettings, output: OutputSettings, metrics: Metrics) -> None:
        """Compile the rules.

        Raises:
            ConfigurationError: A pattern cannot be used.
        """
        self._pii = pii
        self._metrics = metrics
        self._blocked = output.blocked_patterns
        # A model has few sets of tokens, known once it is loaded: with and without those of calls.
        self._filter = lru_cache(maxsize=8)(partial(OutputFilter, blocked_patterns=self._blocked))
        try:
            patterns = [(p.name, p.pattern) for p in pii.patterns]
            self._scanner = PiiScanner(pii.kinds, patterns, pii.regions)
            self._filter(())
        except ValueError as error:
            raise ConfigurationError(f"configuration error: {error}") from None
        self.mode = (pii.input, pii.output)
        """Part of what decides an answer, for the response cache."""

    def prompt(self, text: str, *, param: str) -> str:
        """A prompt as the model may see it; ``param`` names the request field in errors.

        Raises:
            PiiDetectedError: It holds personal data and ``pii.input`` is reject.
        """
        if self._pii.input == "off":
            return text
        redacted, counts = self._scanner.redact(text)
        if counts and self._pii.input == "reject":
            raise PiiDetectedError(
                f"The request holds personal data: {', '.join(sorted(counts))}.", param=param
            )
        self._count(counts)
        return redacted

    def values(self, value: Any, *, param: str) -> Any:
        """A JSON value whose strings are as :meth:`prompt` leaves them; members' names stay."""
        if isinstance(value, str):
            return self.prompt(value, param=param)
        if isinstance(value, Mapping):
            return {name: self.values(member, param=param) for name, member in value.items()}
        if isinstance(value, list | tuple):
            return [self.values(member, param=param) for member in value]
        return value

    def arguments(self, text: str, *, param: str) -> str:
        """A tool call's arguments as :meth:`values` leaves them; what is no JSON stays.

        Raises:
            PiiDetectedError: See :meth:`prompt`.
        """
        try:
            value = json.loads(text)
            clean = self.values(value, param=param)
        except (ValueError, RecursionError):
            return text
        return text if clean == value else json.dumps(clean, ensure_ascii=False)

    @property
    def takes_out(self) -> bool:
        """Whether answers may lose text that the model generated on purpose."""
        return self._pii.output == "redact" or bool(self._blocked)

    def answer(
        self,
        template_tokens: tuple[str, ...],
        grammar: Grammar | None = None,
        call_trigger: str | None = None,
    ) -> "AnswerScreen":
        """Screens one answer on its way.

        Args:
            template_tokens: Texts that may not stand in it.
            grammar: What the whole answer looks like.
            call_trigger: The text that begins a call of a tool.
        """
        rules = self._filter(template_tokens)
        counts: Counter[str] = Counter()

        def redactor(before: str) -> StreamRedactor | None:
            return self._scanner.stream(before, counts) if self._pii.output == "redact" else None

        def open_text(before: str) -> TextScreen:
            return _Text(None, redactor(before))

        def open_json(*, numbers_stay: bool = True, whole: bool = False) -> JsonScreen:
            return JsonScreen(
                lambda before: _Text(StreamFilter(rules), redactor(before)),
                numbers_stay=numbers_stay,
                whole=whole,
            )

        # Where nothing is looked for, the model's own spelling of JSON stays.
        inner: TextScreen | None = None

        def open_whole(_: str) -> TextScreen:
            return open_json(numbers_stay=grammar != ANY_OBJECT, whole=True)

        open_answer = open_whole if isinstance(grammar, JsonSchemaGrammar) else open_text
        if self.takes_out and call_trigger is not None:
            inner = CallsScreen(call_trigger, open_answer, open_json)
        elif self.takes_out:
            inner = open_answer("")
        return AnswerScreen(StreamFilter(rules), inner, counts, self._count)

    def _count(self, counts: Counter[str]) -> None:
        for kind, number in counts.items():
            self._metrics.pii_redactions.labels(kind).inc(number)


class _Text:
    """Screens one text: blocked patterns and template tokens first, then personal data."""

    def __init__(self, outgoing: StreamFilter | None, redactor: StreamRedactor | None) -> None:
        self._outgoing = outgoing
        self._redactor = redactor

    @property
    def blocked(self) -> bool:
        return self._outgoing is not None and self._outgoing.blocked

    def feed(self, text: str) -> str:
        if self._outgoing is not None:
            text = self._outgoing.feed(text)
        return text if self._redactor is None else self._redactor.feed(text)

    def flush(self) -> str:
        rest = "" if self._outgoing is None else self._outgoing.flush()
        if self._redactor is not None:
            rest = self._redactor.feed(rest) + self._redactor.flush()
        return rest


class AnswerScreen:
    """One answer as its caller may see it; the text does not depend on where it is cut.

    ``outgoing`` takes out template tokens and ends the answer at a blocked pattern, by the text as
    the model wrote it. ``inner``, if any, takes out personal data, and does the same by the text
    that JSON's escapes stand for. ``count`` is told the ``counts`` of what ``inner`` has taken out.
    """

    def __init__(
        self,
        outgoing: StreamFilter,
        inner: TextScreen | None,
        counts: Counter[str],
        count: Callable[[Counter[str]], None],
    ) -> None:
        self._outgoing = outgoing
        self._inner = inner
        self._counts = counts
        self._count = count
        self._generated = self._passed = 0
        self._flushed = False

    @property
    def blocked(self) -> bool:
        """Whether a blocked pattern has ended the answer."""
        return self._outgoing.blocked or (self._inner is not None and self._inner.blocked)

    @property
    def changed(self) -> bool:
        """Whether the text that has passed is not what was generated; asked at the end."""
        return bool(self._counts) or self._passed != self._generated

    def feed(self, text: str) -> str:
        """What may be passed on, now that ``text`` has been generated."""
        self._generated += len(text)
        passed = self._outgoing.feed(text)
        if self._inner is not None:
            passed = self._inner.feed(passed)
        self._passed += len(passed)
        return passed

    def flush(self) -> str:
        """What was held back, once no more text comes; may be called again."""
        if self._flushed:
            return ""
        self._flushed = True
        rest = self._outgoing.flush()
        if self._inner is not None:
            rest = self._inner.feed(rest) + self._inner.flush()
        self._count(self._counts)
        self._passed += len(rest)
        return rest
