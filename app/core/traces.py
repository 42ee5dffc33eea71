"""OpenTelemetry's traces; OpenTelemetry's own variables of the environment switch them on."""

from collections.abc import MutableMapping
from typing import TYPE_CHECKING

from app.utils.errors import ConfigurationError

if TYPE_CHECKING:
    from app.core.otlp import SpanExport

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
# Of requests whose caller has not decided.
_SAMPLED_PART = "0.05"
# A collector that hangs delays the exit by twice this. OpenTelemetry's default is 10.
_TIMEOUT_SECONDS = "1"


def make_span_export(service: str, environment: MutableMapping[str, str]) -> "SpanExport | None":
    """What makes spans and sends them; ``None`` where the environment names no collector.

    Args:
        service: Name of the service where the environment has none.
        environment: The process' own; it gets defaults.

    Raises:
        ConfigurationError: OpenTelemetry's SDK is not installed.
    """
    if (
        not any(environment.get(name) for name in _ENDPOINTS)
        or environment.get("OTEL_TRACES_EXPORTER", "otlp") == "none"
        or environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    ):
        return None
    if not environment.get("OTEL_TRACES_SAMPLER"):
        environment["OTEL_TRACES_SAMPLER"] = "parentbased_traceidratio"
        environment.setdefault("OTEL_TRACES_SAMPLER_ARG", _SAMPLED_PART)
    environment.setdefault("OTEL_EXPORTER_OTLP_TIMEOUT", _TIMEOUT_SECONDS)
    if "service.name=" not in environment.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        environment.setdefault("OTEL_SERVICE_NAME", service)
    try:
        from app.core.otlp import SpanExport
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ConfigurationError(
            "configuration error: OTEL_EXPORTER_OTLP_ENDPOINT needs OpenTelemetry's SDK, which the "
            "extra `tracing` installs: poetry install --extras tracing"
        ) from None
    return SpanExport()
