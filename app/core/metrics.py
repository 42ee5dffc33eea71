"""Every Prometheus metric of the service, on a private registry.

Label values are bounded: a route's template, a status, a reason from a fixed list. No label holds
text that a caller can choose.
"""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

# A cache hit takes about a millisecond, a long generation minutes.
_REQUEST_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 120, 300),
)
_TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60)
_ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_LAG_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_QUEUE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """All metrics of the service; the composition root makes one and passes it on."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        # The library would add a series with the creation time of each series.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._add_http()
        self._add_engine()
        self._add_timings()
        self._add_services()

    def _add_http(self) -> None:
        r = self.registry
        self.http_requests = Counter(
            "http_requests_total",
            "HTTP requests answered.",
            ("method", "endpoint", "status"),
            registry=r,
        )
        self.http_duration = Histogram(
            "http_request_duration_seconds",
            "Time from a request's first byte in to its last byte out.",
            ("method", "endpoint"),
            buckets=_REQUEST_BUCKETS,
            registry=r,
        )
        self.connections_open = Gauge(
            "http_connections_open", "Open connections of clients.", registry=r
        )
        self.connections_dropped = Counter(
            "http_connections_dropped_total",
            "Connections ended by the service for being slow, malformed or too many.",
            ("reason",),
            registry=r,
        )
        self.rate_limited = Counter(
            "rate_limited_total", "Requests refused by a caller's limits.", ("reason",), registry=r
        )

    def _add_engine(self) -> None:
        r = self.registry
        self.tokens_generated = Counter(
            "tokens_generated_total", "Tokens generated.", ("model",), registry=r
        )
        self.prompt_tokens = Counter(
            "llm_prompt_tokens_total", "Prompt tokens of admitted requests.", registry=r
        )
        self.prefix_cached_tokens = Counter(
            "llm_prefix_cached_tokens_total",
            "Prompt tokens whose keys and values were already in the KV cache.",
            registry=r,
        )
        self.running = Gauge("llm_requests_running", "Requests in the running batch.", registry=r)
        self.waiting = Gauge("llm_requests_waiting", "Admitted requests that wait.", registry=r)
        self.kv_cache_usage = Gauge(
            "llm_kv_cache_usage_ratio", "Share of the KV cache in use, 0 to 1.", registry=r
        )
        self.rejected = Counter(
            "llm_requests_rejected_total",
            "Requests refused before they ran.",
            ("reason",),
            registry=r,
        )
        self.cancelled = Counter(
            "llm_requests_cancelled_total", "Requests whose caller left.", registry=r
        )
        self.engine_restarts = Counter(
            "llm_engine_restarts_total", "Times the engine process was started again.", registry=r
        )
        self.model_info = Gauge(
            "llm_model_info",
            "Always 1; the labels say what is served.",
            ("model", "engine", "device", "dtype"),
            registry=r,
        )

    def _add_timings(self) -> None:
        r = self.registry
        self.time_to_first_token = Histogram(
            "llm_time_to_first_token_seconds",
            "Time from admission to the first token.",
            buckets=_TTFT_BUCKETS,
            registry=r,
        )
        self.inter_token_latency = Histogram(
            "llm_inter_token_latency_seconds",
            "Time between two tokens of one request.",
            buckets=_ITL_BUCKETS,
            registry=r,
        )
        self.queue_time = Histogram(
            "llm_request_queue_seconds",
            "Time a request waited for a place in the running batch.",
            buckets=_QUEUE_BUCKETS,
            registry=r,
        )
        self.event_loop_lag = Histogram(
            "event_loop_lag_seconds",
            "Time by which the event loop of the API process was late for a timer.",
            buckets=_LAG_BUCKETS,
            registry=r,
        )
        self.event_loop_tasks = Gauge(
            "event_loop_tasks",
            "Tasks on the event loop of the API process; back where it was once nobody calls.",
            registry=r,
        )
        self.request_duration = Histogram(
            "llm_request_duration_seconds",
            "Time from admission to the last token.",
            ("finish_reason",),
            buckets=_REQUEST_BUCKETS,
            registry=r,
        )

    def _add_services(self) -> None:
        r = self.registry
        self.pii_redactions = Counter(
            "pii_redactions_total", "Pieces of personal data replaced.", ("kind",), registry=r
        )
        self.cache_requests = Counter(
            "response_cache_requests_total",
            "Look-ups in the response cache.",
            ("result",),
            registry=r,
        )
        self.idempotency_requests = Counter(
            "idempotency_requests_total",
            "Requests with an idempotency key.",
            ("result",),
            registry=r,
        )
        self.sessions_active = Gauge(
            "chat_sessions_active", "Conversations that are kept.", registry=r
        )
        self.cache_entries = Gauge(
            "response_cache_entries", "Answers in the response cache.", registry=r
        )

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
