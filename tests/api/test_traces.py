"""Traces, as a real collector gets them: which spans a request has, and what they do not tell."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from app.core.traces import make_span_export
from app.utils.errors import ConfigurationError
from tests.conftest import RunApp
from tests.support.live import LONG, generate, open_stream
from tests.support.service import API_KEY, Service, running_service

pytest.importorskip("opentelemetry.sdk", reason="needs the extra `tracing`")

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from app.core.otlp import SpanExport
from scripts.spans import Span, collector, spans_in

CANARY = "canary-77d0"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


class Collector:
    """What came.

    Attributes:
        raw: The bodies.
        spans: The spans in them.
    """

    def __init__(self) -> None:
        self.raw: list[bytes] = []
        self.spans: list[Span] = []

    def take(self, body: bytes) -> None:
        """Take a body."""
        self.raw.append(body)
        self.spans += spans_in(body)


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """A collector and its address."""
    taken = Collector()
    with collector(taken.take, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield taken, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[Service, Collector]]:
    """A slow service that sends its spans to a collector every tenth of a second."""
    with (
        collecting() as (taken, address),
        running_service(
            OTEL_EXPORTER_OTLP_ENDPOINT=address,
            OTEL_BSP_SCHEDULE_DELAY="100",
            LOGGING__AUDIT="true",
            ENGINE__ECHO_STEP_SECONDS="0.02",
        ) as service,
    ):
        yield service, taken


def spans_of(service: Service, taken: Collector, headers: dict[str, str]) -> list[Span]:
    """The spans of the request with these headers, once its HTTP span has come."""
    trace = headers["traceparent"].split("-")[1]

    def found() -> list[Span]:
        return [s for s in taken.spans if s["trace"] == trace]

    service.wait_for(lambda: any(s["name"].startswith("POST") for s in found()), "the HTTP span")
    return found()


def parent_of(number: int) -> dict[str, str]:
    """Headers of a trace with a name of its own, which is sampled."""
    return {"traceparent": f"00-{number:032x}-{PARENT}-01"}


def test_a_streamed_chat_is_five_spans(traced: tuple[Service, Collector]) -> None:
    """A streamed chat has its HTTP span, its generation, and three phases, all of one trace."""
    service, taken = traced
    body = {"messages": [{"role": "user", "content": CANARY}], "stream": True, "session_id": CANARY}
    with service.client(headers=SAMPLED) as client:
        url = f"/v1/chat?note={CANARY}"
        assert client.post(url, json=body, headers={"X-Request-ID": "told"}).status_code == 200
    spans = {s["name"]: s for s in spans_of(service, taken, SAMPLED)}
    assert set(spans) == {"POST /v1/chat", "chat echo", "queue", "prefill", "decode"}
    root, chat = spans["POST /v1/chat"], spans["chat echo"]
    assert (root["parent"], chat["parent"]) == (PARENT, root["id"])
    phases = [spans[name] for name in ("queue", "prefill", "decode")]
    assert {p["parent"] for p in phases} == {chat["id"]}
    assert [p["end"] for p in phases] == [p["begin"] for p in phases[1:]] + [chat["end"]]
    assert root["begin"] <= chat["begin"] == phases[0]["begin"]
    assert chat["gen_ai.response.finish_reasons"] == ["stop"]
    assert chat["gen_ai.usage.output_tokens"] >= len(CANARY)
    assert not any(s["failed"] for s in spans.values())
    lines = service.lines(lambda e: e.get("request_id") == "told", 2)
    assert len(lines) == 2
    assert {(e["trace_id"], e["span_id"]) for e in lines} == {(TRACE, root["id"])}
    for secret in (CANARY, API_KEY):
        assert all(secret.encode() not in raw for raw in taken.raw)


def test_the_application_makes_spans_of_one_trace(
    run_app: RunApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that names no trace begins one, whose spans an exporter in memory gets."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    memory = InMemorySpanExporter()
    with collecting() as (_, address):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        export = SpanExport()
        export.provider.add_span_processor(SimpleSpanProcessor(memory))
        monkeypatch.setattr("app.main.make_span_export", lambda *_: export)
        assert run_app().post("/v1/generate", json=generate("a", max_tokens=1)).is_success
        spans = memory.get_finished_spans()
        export.provider.shutdown()
    names = {span.name for span in spans}
    assert names == {"POST /v1/generate", "text_completion echo", "queue", "prefill", "decode"}
    assert len({span.context.trace_id for span in spans}) == 1


def test_latencies_name_the_sampled_traces_behind_them(traced: tuple[Service, Collector]) -> None:
    """OpenMetrics has a sampled request's trace beside its latencies, and none of another."""
    service, _ = traced
    unsampled = {"traceparent": f"00-{8:032x}-{PARENT}-00"}
    with service.client() as client:
        for headers in (unsampled, parent_of(7), unsampled):
            body = generate("exemplar", cache=False)
            assert client.post("/v1/generate", json=body, headers=headers).is_success
        page = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert page.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page.text):  # type: ignore[no-untyped-call]
        for sample in family.samples:
            if sample.exemplar:
                found.setdefault(family.name, set()).add(sample.exemplar.labels["trace_id"])
    assert found.keys() == {
        *("http_request_duration_seconds", "llm_request_duration_seconds"),
        *("llm_request_queue_seconds", "llm_time_to_first_token_seconds"),
    }
    for traces in found.values():
        assert f"{7:032x}" in traces
        assert f"{8:032x}" not in traces


def test_failed_generations_say_why(traced: tuple[Service, Collector]) -> None:
    """A fault of the engine and a client that leaves are told by the kind of the error alone."""
    service, taken = traced
    fault = generate(f"[echo:fault]{CANARY}")
    with service.client(headers=parent_of(1)) as client:
        assert client.post("/v1/generate", json=fault).status_code == 500
    with open_stream(service, generate(LONG), headers=parent_of(2)):
        pass
    for number, kind in ((1, "internal_error"), (2, "cancelled")):
        spans = spans_of(service, taken, parent_of(number))
        (told,) = [s for s in spans if s["name"] == "text_completion echo"]
        assert (told["failed"], told["error.type"]) == (True, kind)
    assert all(CANARY.encode() not in raw for raw in taken.raw)


def test_what_is_not_sampled_is_not_sent(traced: tuple[Service, Collector]) -> None:
    """A request that its caller does not sample has no span, nor have probes and sessions."""
    service, taken = traced
    with service.client() as client:
        client.get("/livez", headers=parent_of(3))
        client.get(f"/v1/sessions/{CANARY}", headers=parent_of(4))
        not_sampled = {"traceparent": f"00-{5:032x}-{PARENT}-00", "X-Request-ID": "unsampled"}
        body = generate("a", max_tokens=1)
        assert client.post("/v1/generate", json=body, headers=not_sampled).status_code == 200
        client.post("/v1/generate", json=body, headers=parent_of(6))
    spans_of(service, taken, parent_of(6))
    assert not {f"{number:032x}" for number in (3, 4, 5)} & {s["trace"] for s in taken.spans}
    # The caller's trace names the lines all the same.
    lines = service.lines(lambda e: e.get("request_id") == "unsampled")
    assert {e["trace_id"] for e in lines} == {f"{5:032x}"}


def test_a_decision_before_the_first_span_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of requests without a trace the sampled part is the configured one, decided once."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    export = SpanExport()
    tracer = export.provider.get_tracer("test")
    sampled = 0
    for _ in range(400):
        unsampled = export.unsampled([(b"host", b"localhost")])
        if unsampled is None:
            assert tracer.start_span("request", context=Context()).is_recording()
            sampled += 1
        else:
            assert unsampled.is_valid
            assert not unsampled.trace_flags.sampled
    # Eight standard deviations; decided twice it would be a quarter.
    assert 120 < sampled < 280
    for flags, is_sampled in (("01", True), ("00", False)):
        parent = (b"traceparent", f"00-{TRACE}-{PARENT}-{flags}".encode())
        span = export.unsampled([parent])
        assert (span is None) is is_sampled
        assert span is None or trace.format_trace_id(span.trace_id) == TRACE
    export.provider.shutdown()


def test_an_unreachable_collector_disturbs_nobody() -> None:
    """Without its collector the service answers, and its exit does not wait for it."""
    with running_service(
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", OTEL_BSP_SCHEDULE_DELAY="100"
    ) as service:
        for _ in range(3):
            with service.client(headers=SAMPLED) as client:
                assert client.post("/v1/generate", json=generate("a", max_tokens=1)).is_success


def test_only_an_endpoint_switches_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an endpoint the SDK is not imported; with one, a missing SDK is named."""
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "app.core.otlp", raising=False)
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    for off in (
        {},
        {"OTEL_SERVICE_NAME": "a"},
        {**endpoint, "OTEL_TRACES_EXPORTER": "none"},
        {**endpoint, "OTEL_SDK_DISABLED": "true"},
    ):
        assert make_span_export("service", off) is None
    with pytest.raises(ConfigurationError, match="poetry install --extras tracing"):
        make_span_export("service", endpoint)
    assert endpoint["OTEL_TRACES_SAMPLER_ARG"] == "0.05"
