"""Traces, as a real collector gets them: which spans a request has, and what they do not tell."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tests.support.live import LONG, generate, open_stream
from tests.support.service import API_KEY, Service, running_service

pytest.importorskip("opentelemetry.sdk", reason="needs the extra `tracing`")

CANARY = "canary-77d0"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}

Span = dict[str, Any]


class Collector:
    """Takes spans over HTTP.

    Attributes:
        raw: The bodies that came.
        spans: The spans in them.
    """

    def __init__(self) -> None:
        self.raw: list[bytes] = []
        self.spans: list[Span] = []

    def take(self, body: bytes) -> None:
        """Take a body."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
        )

        self.raw.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        {
                            "name": span.name,
                            "trace": span.trace_id.hex(),
                            "id": span.span_id.hex(),
                            "parent": span.parent_span_id.hex(),
                            "failed": span.status.code == 2,
                            "begin": span.start_time_unix_nano,
                            "end": span.end_time_unix_nano,
                            **{a.key: _value(a.value) for a in span.attributes},
                        }
                    )


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    found = getattr(value, kind)
    return [_value(v) for v in found.values] if kind == "array_value" else found


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """A collector and its address."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            packed = self.headers.get("content-encoding") == "gzip"
            collector.take(gzip.decompress(body) if packed else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[Service, Collector]]:
    """A slow service that sends its spans to a collector every tenth of a second."""
    with (
        collecting() as (collector, address),
        running_service(
            OTEL_EXPORTER_OTLP_ENDPOINT=address,
            OTEL_BSP_SCHEDULE_DELAY="100",
            LOGGING__AUDIT="true",
            ENGINE__ECHO_STEP_SECONDS="0.02",
        ) as service,
    ):
        yield service, collector


def spans_of(service: Service, collector: Collector, headers: dict[str, str]) -> list[Span]:
    """The spans of the request with these headers, once its HTTP span has come."""
    trace = headers["traceparent"].split("-")[1]

    def found() -> list[Span]:
        return [s for s in collector.spans if s["trace"] == trace]

    service.wait_for(lambda: any(s["name"].startswith("POST") for s in found()), "the HTTP span")
    return found()


def parent_of(number: int) -> dict[str, str]:
    """Headers of a trace with a name of its own, which is sampled."""
    return {"traceparent": f"00-{number:032x}-{PARENT}-01"}


def test_a_streamed_chat_is_five_spans(traced: tuple[Service, Collector]) -> None:
    """A streamed chat has its HTTP span, its generation, and three phases, all of one trace."""
    service, collector = traced
    body = {"messages": [{"role": "user", "content": CANARY}], "stream": True, "session_id": CANARY}
    with service.client(headers=SAMPLED) as client:
        url = f"/v1/chat?note={CANARY}"
        assert client.post(url, json=body, headers={"X-Request-ID": "told"}).status_code == 200
    spans = {s["name"]: s for s in spans_of(service, collector, SAMPLED)}
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
    lines = [e for e in service.log() if e.get("request_id") == "told"]
    assert len(lines) == 2
    assert {(e["trace_id"], e["span_id"]) for e in lines} == {(TRACE, root["id"])}
    for secret in (CANARY, API_KEY):
        assert all(secret.encode() not in raw for raw in collector.raw)


def test_failed_generations_say_why(traced: tuple[Service, Collector]) -> None:
    """A fault of the engine and a client that leaves are told by the kind of the error alone."""
    service, collector = traced
    fault = generate(f"[echo:fault]{CANARY}")
    with service.client(headers=parent_of(1)) as client:
        assert client.post("/v1/generate", json=fault).status_code == 500
    with open_stream(service, generate(LONG), headers=parent_of(2)):
        pass
    for number, kind in ((1, "internal_error"), (2, "cancelled")):
        spans = spans_of(service, collector, parent_of(number))
        (told,) = [s for s in spans if s["name"] == "text_completion echo"]
        assert (told["failed"], told["error.type"]) == (True, kind)
    assert all(CANARY.encode() not in raw for raw in collector.raw)


def test_what_is_not_sampled_is_not_sent(traced: tuple[Service, Collector]) -> None:
    """A request that its caller does not sample has no span, nor have probes and sessions."""
    service, collector = traced
    with service.client() as client:
        client.get("/livez", headers=parent_of(3))
        client.get(f"/v1/sessions/{CANARY}", headers=parent_of(4))
        not_sampled = {"traceparent": f"00-{5:032x}-{PARENT}-00", "X-Request-ID": "unsampled"}
        body = generate("a", max_tokens=1)
        assert client.post("/v1/generate", json=body, headers=not_sampled).status_code == 200
        client.post("/v1/generate", json=body, headers=parent_of(6))
    spans_of(service, collector, parent_of(6))
    assert not {f"{number:032x}" for number in (3, 4, 5)} & {s["trace"] for s in collector.spans}
    # The caller's trace names the lines all the same.
    assert {e["trace_id"] for e in service.log() if e.get("request_id") == "unsampled"} == {
        f"{5:032x}"
    }


def test_an_unreachable_collector_disturbs_nobody() -> None:
    """Without its collector the service answers, and its exit does not wait for it."""
    with running_service(
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", OTEL_BSP_SCHEDULE_DELAY="100"
    ) as service:
        for _ in range(3):
            with service.client(headers=SAMPLED) as client:
                assert client.post("/v1/generate", json=generate("a", max_tokens=1)).is_success
