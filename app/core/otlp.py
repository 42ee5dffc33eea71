"""Spans on their way to a collector; importing this module takes OpenTelemetry's SDK."""

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from app import __version__

_QUERY = "url.query"


class _WithoutQuery(SpanProcessor):
    """Takes out what a caller may have written into the address."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002 - the interface
        """A span begins."""
        if span.attributes and _QUERY in span.attributes:
            span.set_attribute(_QUERY, "REDACTED")


def exporting_provider() -> TracerProvider:
    """Makes spans that a thread sends in batches over HTTP, as the environment says."""
    provider = TracerProvider(resource=Resource.create({"service.version": __version__}))
    provider.add_span_processor(_WithoutQuery())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
