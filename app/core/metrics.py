"""Every Prometheus metric of the service, on a private registry.

Label values are bounded: a route's template, a status, a reason from a fixed list. No label holds
text that a caller can choose.
"""

import platform
from collections.abc import Callable, Sequence
from contextvars import ContextVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client import exposition as plain
from prometheus_client.openmetrics import exposition as openmetrics

from app import __version__

# A cache hit takes about a millisecond, a long generation minutes.
_REQUEST_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 120, 300),
)
_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_LAG_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_QUEUE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

exemplar_var: ContextVar[dict[str, str] | None] = ContextVar("exemplar", default=None)
"""Names the trace of the request that is being served, where it is sampled."""


class Metrics:
    """All metrics of the service; the composition root makes one and passes it on.

    Args:
        take_dropped: How many lines of this process's log were lost since the last call.
    """

    def __init__(self, take_dropped: Callable[[], int] = lambda: 0) -> None:
        self._take_dropped = take_dropped
        # The library would add a series with the creation time of each series.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._add_http()
        self._add_engine()
        self._add_timings()
        self._add_services()
        self._add_process()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

    def _add_http(self) -> None:
        self.http_requests = self._counter(
            "http_requests_total", "HTTP requests answered.", "method", "endpoint", "status"
        )
        self.http_duration = self._histogram(
            "http_request_duration_seconds",
            "Time from a request's first byte in to its last byte out.",
            _REQUEST_BUCKETS,
            "method",
            "endpoint",
        )
        self.connections_open = self._gauge("http_connections_open", "Open connections of clients.")
        self.connections_dropped = self._counter(
            "http_connections_dropped_total",
            "Connections ended by the service for being slow, malformed or too many.",
            "reason",
        )
        self.rate_limited = self._counter(
            "rate_limited_total", "Requests refused by a caller's limits.", "reason"
        )

    def _add_engine(self) -> None:
        self.tokens_generated = self._counter(
            "tokens_generated_total", "Tokens generated.", "model"
        )
        self.prompt_tokens = self._counter(
            "llm_prompt_tokens_total", "Prompt tokens of admitted requests."
        )
        self.prefix_cached_tokens = self._counter(
            "llm_prefix_cached_tokens_total",
            "Prompt tokens whose keys and values were already in the KV cache.",
        )
        self.running = self._gauge("llm_requests_running", "Requests in the running batch.")
        self.waiting = self._gauge("llm_requests_waiting", "Admitted requests that wait.")
        self.kv_cache_usage = self._gauge(
            "llm_kv_cache_usage_ratio", "Share of the KV cache in use, 0 to 1."
        )
        self.key_requests = self._counter(
            "llm_requests_total",
            "Requests for answers, by API key; metrics.require_key shows names.",
            *("key", "outcome"),
        )
        self.key_tokens = self._counter(
            "llm_tokens_total",
            "Prompt and completion tokens, by API key; metrics.require_key shows names.",
            "key",
        )
        self.ignored_fields = self._counter(
            "llm_ignored_fields_total", "Fields of requests taken without effect.", "field"
        )
        self.schema_violations = self._counter(
            "llm_schema_violations_total",
            "Answers that break a keyword of their schema which the engine could not hold.",
            "keyword",
        )
        self.rejected = self._counter(
            "llm_requests_rejected_total", "Requests refused before they ran.", "reason"
        )
        self.cancelled = self._counter(
            "llm_requests_cancelled_total", "Requests whose caller left."
        )
        self.engine_restarts = self._counter(
            "llm_engine_restarts_total", "Times the engine process was started again."
        )
        self.model_info = self._gauge(
            "llm_model_info",
            "Always 1; the labels say what is served.",
            *("model", "engine", "device", "dtype"),
        )

    def _add_timings(self) -> None:
        self.time_to_first_token = self._histogram(
            "llm_time_to_first_token_seconds",
            "Time from admission to the first token.",
            _TTFT_BUCKETS,
        )
        self.inter_token_latency = self._histogram(
            "llm_inter_token_latency_seconds",
            "Time between two tokens of one request.",
            _ITL_BUCKETS,
        )
        self.queue_time = self._histogram(
            "llm_request_queue_seconds",
            "Time a request waited for a place in the running batch.",
            _QUEUE_BUCKETS,
        )
        self.event_loop_lag = self._histogram(
            "event_loop_lag_seconds",
            "Time by which the event loop of the API process was late for a timer.",
            _LAG_BUCKETS,
        )
        self.event_loop_tasks = self._gauge(
            "event_loop_tasks",
            "Tasks on the event loop of the API process; back where it was once nobody calls.",
        )
        self.request_duration = self._histogram(
            "llm_request_duration_seconds",
            "Time from admission to the last token.",
            _REQUEST_BUCKETS,
            "finish_reason",
        )

    def _add_services(self) -> None:
        self.pii_redactions = self._counter(
            "pii_redactions_total", "Pieces of personal data replaced.", "kind"
        )
        self.cache_requests = self._counter(
            "response_cache_requests_total", "Look-ups in the response cache.", "result"
        )
        self.idempotency_requests = self._counter(
            "idempotency_requests_total", "Requests with an idempotency key.", "result"
        )
        self.sessions_active = self._gauge("chat_sessions_active", "Conversations that are kept.")
        self.state_up = self._gauge(
            "llm_shared_state_up", "Whether the shared state answers, 1 or 0.", "backend"
        )
        self.state_failures = self._counter(
            "llm_shared_state_failures_total", "Calls that went without the shared state.", "part"
        )
        self.cache_entries = self._gauge("response_cache_entries", "Answers in the response cache.")

    def _add_process(self) -> None:
        self.log_dropped = self._counter(
            "llm_log_records_dropped_total", "Log lines lost, since nobody read them.", "process"
        )
        self.build_info = self._gauge(
            "llm_build_info", "Always 1; the labels are versions.", "version", "python"
        )
        self.build_info.labels(__version__, platform.python_version()).set(1)
        ProcessCollector(registry=self.registry)

    def add_engine_process(self, pid: Callable[[], int | None]) -> None:
        """Show what the kernel counts of the engine process, while it has an id."""
        ProcessCollector("llm_engine", pid=lambda: pid() or "none", registry=self.registry)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics and their content type.

        They are in Prometheus' text format, or in OpenMetrics, which alone has exemplars.

        Args:
            accept: The content types that the reader asks for.
        """
        self.log_dropped.labels("api").inc(self._take_dropped())
        if "application/openmetrics-text" in accept:
            page: bytes = openmetrics.generate_latest(self.registry)  # type: ignore[no-untyped-call]
            return page, openmetrics.CONTENT_TYPE_LATEST
        return plain.generate_latest(self.registry), plain.CONTENT_TYPE_LATEST
