"""Spans on their way to a collector; importing this module takes OpenTelemetry's SDK."""

from collections.abc import Iterable

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import SpanContext, SpanKind

from app import __version__

_QUERY = "url.query"


class _WithoutQuery(SpanProcessor):
    """Takes out what a caller may have written into the address."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002 - the interface
        """A span begins."""
        if span.attributes and _QUERY in span.attributes:
            span.set_attribute(_QUERY, "REDACTED")


class _Ids(RandomIdGenerator):
    """Random ids, but for a trace whose id is known before its first span."""

    next_trace: int | None = None

    def generate_trace_id(self) -> int:
        """The id of a new trace."""
        known, self.next_trace = self.next_trace, None
        return known or super().generate_trace_id()


class SpanExport:
    """Spans that a thread sends in batches over HTTP, as the environment says.

    Attributes:
        provider: Makes them.
    """

    def __init__(self) -> None:
        self._ids = _Ids()
        resource = Resource.create({"service.version": __version__})
        self.provider = TracerProvider(resource=resource, id_generator=self._ids)
        self.provider.add_span_processor(_WithoutQuery())
        self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        # As the propagators spell them.
        self._names = {n.lower().encode(): n for n in propagate.get_global_textmap().fields}

    def unsampled(self, headers: Iterable[tuple[bytes, bytes]]) -> SpanContext | None:
        """The span of a request that is not sampled, for the log; ``None`` where it is sampled.

        The request's first span is to be begun next. Without this question an unsampled request
        costs as much as one whose spans are only not sent.
        """
        found = {self._names[n]: v.decode("latin-1") for n, v in headers if n in self._names}
        context = propagate.extract(found) if found else Context()
        parent = trace.get_current_span(context).get_span_context()
        trace_id = parent.trace_id if parent.is_valid else self._ids.generate_trace_id()
        sampled = self.provider.sampler.should_sample(context, trace_id, "", SpanKind.SERVER)
        if sampled.decision is not Decision.DROP:
            self._ids.next_trace = None if parent.is_valid else trace_id
            return None
        return SpanContext(trace_id, self._ids.generate_span_id(), is_remote=False)
