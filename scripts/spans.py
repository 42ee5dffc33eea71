"""Prints the spans that services send to http://localhost:4318, for a look at a trace.

It takes OpenTelemetry's protocol over HTTP, as a collector does, until it is interrupted.
"""

import gzip
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

_PORT = 4318
_ERROR = 2

Span = dict[str, Any]
"""Name, trace, id, parent, times in nanoseconds, whether it failed, and the attributes."""


def spans_in(body: bytes) -> list[Span]:
    """The spans in the body of a request."""
    return [
        {
            "name": span.name,
            "trace": span.trace_id.hex(),
            "id": span.span_id.hex(),
            "parent": span.parent_span_id.hex(),
            "begin": span.start_time_unix_nano,
            "end": span.end_time_unix_nano,
            "failed": span.status.code == _ERROR,
            **{a.key: _value(a.value) for a in span.attributes},
        }
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    found = getattr(value, kind)
    return [_value(each) for each in found.values] if kind == "array_value" else found


def collector(take: Callable[[bytes], None], port: int) -> HTTPServer:
    """A server of this machine that hands on the bodies which services send."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Take one body."""
            body = self.rfile.read(int(self.headers["content-length"]))
            packed = self.headers.get("content-encoding") == "gzip"
            take(gzip.decompress(body) if packed else body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    return HTTPServer(("127.0.0.1", port), Handler)


def _print(body: bytes) -> None:
    for span in sorted(spans_in(body), key=lambda span: (span["trace"], span["begin"])):
        milliseconds = (span["end"] - span["begin"]) / 1e6
        shown = [span["trace"], span["parent"] or "-" * 16, span["id"], f"{milliseconds:9.2f} ms"]
        print(*shown, span["name"], flush=True)


if __name__ == "__main__":
    with collector(_print, _PORT) as server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            sys.exit()
