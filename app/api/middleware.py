"""Pure ASGI middleware: request id, timing, metrics, access log, crashes, body limit.

Headers are added as pairs of bytes, because under an overload the processor time of a rejection is
taken from the answers to other requests.
"""

import logging
import random
import re
from collections.abc import Callable, Iterable
from http import HTTPStatus
from time import perf_counter

from opentelemetry import trace
from opentelemetry.trace import SpanContext
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import METHODS, error_response
from app.core.logging import get_logger, request_id_var, trace_var
from app.core.metrics import Metrics, exemplar_var
from app.utils.errors import BodyTooLargeError, InternalError, InvalidRequestError, ServiceError

log = get_logger()

HeaderPairs = Iterable[tuple[bytes, bytes]]
HeaderList = list[tuple[bytes, bytes]]

UNMATCHED = "unmatched"
UNSAMPLED_SPAN = "llm-service.span"
"""Where the scope has the span that a request would have, were it sampled."""
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Data loads nothing and is not framed. A page brings its own policy.
_SECURITY_HEADERS = (
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
CLOSE = (b"connection", b"close")
# Monitoring and the playground call these every few seconds, and their lines would hide all others.
_QUIET_ROUTES = frozenset({"/health", "/livez", "/readyz", "/metrics", "/status"})


class RequestContextMiddleware:
    """Gives each request an id and a clock, and counts and logs its outcome.

    It is the outermost layer, so that a crash too is answered in the one error shape, with the
    headers that every response has.

    Args:
        metrics: Where requests are counted.
        leaving: Whether the service is shutting down.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, leaving: Callable[[], bool]) -> None:
        self._app = app
        self._metrics = metrics
        self._leaving = leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = perf_counter()
        request_id = _request_id(Headers(scope=scope))
        token = request_id_var.set(request_id)
        span = scope.get(UNSAMPLED_SPAN) or trace.get_current_span().get_span_context()
        traced = trace_var.set(_names_of(span))
        exemplar = exemplar_var.set(_exemplar(span))
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = common_headers(message["headers"], request_id, perf_counter() - begin)
                if self._leaving() and CLOSE not in headers:
                    # The next request on this connection would meet its end.
                    headers.append(CLOSE)
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            # The client left while its body was being read.
            pass
        except Exception:
            log.exception("unhandled exception")
            if status:
                # The response has begun, and ending it early is the only signal left.
                raise
            await error_response(InternalError())(scope, receive, send_with_headers)
        finally:
            self._record(scope, status, perf_counter() - begin)
            request_id_var.reset(token)
            trace_var.reset(traced)
            exemplar_var.reset(exemplar)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a finished request and log it; ``status`` is 0 when there was no response."""
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = route_template(scope)
        code = status or 499
        # Anybody can try every method on every route, and each pair would make a histogram.
        endpoint = UNMATCHED if code == HTTPStatus.METHOD_NOT_ALLOWED else route
        self._metrics.http_requests.labels(method, endpoint, code).inc()
        duration = self._metrics.http_duration.labels(method, endpoint)
        duration.observe(seconds, exemplar_var.get())
        told = {
            "method": method,
            "route": route,
            "status_code": code,
            "latency_ms": round(seconds * 1000, 2),
        }
        level = logging.DEBUG if route in _QUIET_ROUTES else logging.INFO
        log.log(level, "%s %s - %d", method, route, code, extra=told)


class BodyLimitMiddleware:
    """Rejects a body over the limit, by its Content-Length or as soon as more has been received."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self._max_bytes:
            await error_response(BodyTooLargeError(self._max_bytes))(scope, receive, send)
            return
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    raise BodyTooLargeError(self._max_bytes)
            return message

        await self._app(scope, limited_receive, send)


class CrossOriginMiddleware(CORSMiddleware):
    """Starlette's, whose refusals of a preflight have the one error shape."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a browser that asks whether a page may call."""
        response = super().preflight_response(request_headers)
        if response.status_code < HTTPStatus.BAD_REQUEST:
            return response
        refused = error_response(
            InvalidRequestError(
                "This origin, or what it asks for, is not in security.cors_origins."
            )
        )
        refused.headers["Vary"] = response.headers["Vary"]
        return refused


def common_headers(headers: HeaderPairs, request_id: str, seconds: float) -> HeaderList:
    """A response's own headers and those of every response: security, request id, processing time.

    Args:
        headers: The response's own, which come first. Names are in lower case, as in ASGI.
        request_id: The request's id.
        seconds: Time since the request arrived.
    """
    own = {name for name, _ in headers}
    added = [pair for pair in _SECURITY_HEADERS if pair[0] not in own]
    added.append((b"x-request-id", request_id.encode()))
    added.append((b"x-process-time", b"%.6f" % seconds))
    return [*headers, *added]


def last_response(error: ServiceError, server_headers: HeaderPairs) -> bytes:
    """The bytes of an error response that ends a connection before there is a request.

    Args:
        error: The error to report.
        server_headers: Headers that the server adds to every response.
    """
    request_id = new_request_id()
    token = request_id_var.set(request_id)
    response = error_response(error)
    request_id_var.reset(token)
    headers = common_headers(response.raw_headers, request_id, seconds=0.0)
    head = [b"HTTP/1.1 %d %s" % (error.status, HTTPStatus(error.status).phrase.encode())]
    head += [b"%s: %s" % pair for pair in (*server_headers, *headers, CLOSE)]
    return b"\r\n".join([*head, b"", response.body])


def route_template(scope: Scope) -> str:
    """The matched route's path template, or ``unmatched``."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else UNMATCHED


def _names_of(span: SpanContext) -> dict[str, str] | None:
    """A span, as the log names it."""
    if not span.is_valid:
        return None
    return {
        "trace_id": trace.format_trace_id(span.trace_id),
        "span_id": trace.format_span_id(span.span_id),
    }


def _exemplar(span: SpanContext) -> dict[str, str] | None:
    """A span's trace, as a histogram names it, where it is sampled."""
    if not span.trace_flags.sampled:
        return None
    return {"trace_id": trace.format_trace_id(span.trace_id)}


def new_request_id() -> str:
    """A random id for a request."""
    # It only has to be unique. Python's generator is cheaper than the system's.
    return f"req-{random.getrandbits(128):032x}"  # nosec B311


def _request_id(headers: Headers) -> str:
    """The caller's id if it is harmless in a log, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _SANE_REQUEST_ID.fullmatch(given) else new_request_id()
