"""What may reach the model and what may leave it: personal data, blocked patterns, stray tokens."""

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from app.core.config import OutputSettings, PiiSettings
from app.core.metrics import Metrics
from app.core.output_filter import OutputFilter
from app.core.pii import PiiScanner
from app.llm.generator import GenerationReport
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
        try:
            self._scanner = PiiScanner(pii.kinds, [(p.name, p.pattern) for p in pii.patterns])
            self._filter = OutputFilter((), self._blocked)
        except ValueError as error:
            raise ConfigurationError(f"configuration error: {error}") from None
        self._filter_tokens: tuple[str, ...] = ()
        self.mode = (pii.input, pii.output)
        """Part of what decides an answer, for the response cache."""

    def prompt(self, text: str, *, param: str) -> str:
        """A prompt as the model may see it.

        Args:
            text: What the caller sent.
            param: The request field it stood in.

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

    @property
    def takes_out(self) -> bool:
        """Whether answers may lose text that the model generated on purpose."""
        return self._pii.output == "redact" or bool(self._blocked)

    async def answer(
        self,
        pieces: AsyncIterator[str],
        report: GenerationReport,
        template_tokens: tuple[str, ...],
    ) -> AsyncGenerator[str, None]:
        """An answer as its caller may see it; the pieces joined do not depend on their cuts.

        Args:
            pieces: What the model says; empty pieces are passed on as they are.
            report: Its finish reason becomes ``content_filter`` where a pattern ended the
                answer; its tokens are forgotten where the text is not theirs any more.
            template_tokens: Spellings that are not to leak.
        """
        outgoing = self._filter_for(template_tokens).stream()
        redactor = self._scanner.stream() if self._pii.output == "redact" else None
        sent = generated = 0
        ended = False
        async for piece in pieces:
            generated += len(piece)
            text = outgoing.feed(piece)
            text = redactor.feed(text) if redactor else text
            sent += len(text)
            if text or not piece:
                yield text
            if outgoing.blocked:
                ended = True
                break
        rest = outgoing.flush()
        rest = redactor.feed(rest) + redactor.flush() if redactor else rest
        if rest:
            sent += len(rest)
            yield rest
        if redactor:
            self._count(redactor.counts)
        if ended or outgoing.blocked:
            report.finish_reason = "content_filter"
        if sent != generated or (redactor and redactor.counts):
            report.token_ids.clear()

    def _filter_for(self, template_tokens: tuple[str, ...]) -> OutputFilter:
        # The tokens are known once the model is loaded, and stay what they are.
        if template_tokens != self._filter_tokens:
            self._filter = OutputFilter(template_tokens, self._blocked)
            self._filter_tokens = template_tokens
        return self._filter

    def _count(self, counts: Counter[str]) -> None:
        for kind, number in counts.items():
            self._metrics.pii_redactions.labels(kind).inc(number)
