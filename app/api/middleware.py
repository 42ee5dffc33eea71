"""Pure ASGI middleware: request id, timing, metrics, access log, crashes, limits.

Under an overload a refusal is all that most requests get, and what it costs is taken from the
answers of the others: so headers are read and added here as the pairs of bytes that they are.
"""

import logging
import random
import re
from collections.abc import Callable, Iterable
from functools import cache
from http import HTTPStatus
from time import perf_counter

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import METHODS, error_response
from app.core.logging import get_logger, request_id_var
from app.core.metrics import Metrics
from app.utils.errors import BodyTooLargeError, InternalError, ServiceError

log = get_logger()

HeaderPairs = Iterable[tuple[bytes, bytes]]
HeaderList = list[tuple[bytes, bytes]]

UNMATCHED = "unmatched"
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SECURITY_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
# What is no page needs nothing; a page, such as /docs, brings its scripts, but nobody's frame.
_POLICY = b"content-security-policy"
_DATA_POLICY = b"default-src 'none'; frame-ancestors 'none'"
_PAGE_POLICY = b"base-uri 'none'; frame-ancestors 'none'; object-src 'none'"
CLOSE = (b"connection", b"close")
# Called every few seconds by machines; they would drown what people want to read.
_QUIET_ROUTES = frozenset({"/health", "/livez", "/readyz", "/metrics"})


class RequestContextMiddleware:
    """Gives each request an id and a clock, and tells what became of it.

    It is the outermost layer, so that even a crash is answered in the one error shape, with
    the headers every response has.

    Args:
        metrics: Where requests are counted.
        leaving: Whether the service is about to end.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, leaving: Callable[[], bool]) -> None:
        self._app = app
        self._leaving = leaving
        # Looking a series up by its labels takes longer than adding to it.
        self._requests = cache(metrics.http_requests.labels)
        self._duration = cache(metrics.http_duration.labels)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = perf_counter()
        request_id = _request_id(scope["headers"])
        token = request_id_var.set(request_id)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = common_headers(message["headers"], request_id, perf_counter() - begin)
                if self._leaving() and CLOSE not in headers:
                    # A request sent down this connection later would cross with its end.
                    headers.append(CLOSE)
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            # It left while its body was being read: nobody is there to be answered.
            pass
        except Exception:
            log.exception("unhandled exception")
            if status:
                # The response has begun: ending it early is all that can be said.
                raise
            await error_response(InternalError())(scope, receive, send_with_headers)
        finally:
            self._record(scope, status, perf_counter() - begin)
            request_id_var.reset(token)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request that is over and write its line in the log; status 0 is no response."""
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = route_template(scope)
        code = status or 499
        # Anybody can try every method on every route, and each pair would have its histogram.
        endpoint = UNMATCHED if code == HTTPStatus.METHOD_NOT_ALLOWED else route
        self._requests(method, endpoint, code).inc()
        self._duration(method, endpoint).observe(seconds)
        level = logging.DEBUG if route in _QUIET_ROUTES else logging.INFO
        if log.isEnabledFor(level):
            log.log(
                level,
                "%s %s - %d",
                method,
                route,
                code,
                extra={
                    "method": method,
                    "route": route,
                    "status_code": code,
                    "latency_ms": round(seconds * 1000, 2),
                },
            )


class BodyLimitMiddleware:
    """Refuses bodies over a limit: at once by Content-Length, else when the limit is passed."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = _value(scope["headers"], b"content-length")
        if announced.isdigit() and int(announced[:20]) > self._max_bytes:
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


def common_headers(headers: HeaderPairs, request_id: str, seconds: float) -> HeaderList:
    """A response's headers and those that every response has: security, request id and time.

    Args:
        headers: Its own, which go first; their names are lower case, as ASGI has them.
        request_id: The request's id.
        seconds: Since the request came.
    """
    own = dict(headers)
    added = [pair for pair in _SECURITY_HEADERS if pair[0] not in own]
    if _POLICY not in own:
        is_page = own.get(b"content-type", b"").startswith(b"text/html")
        added.append((_POLICY, _PAGE_POLICY if is_page else _DATA_POLICY))
    added.append((b"x-request-id", request_id.encode()))
    added.append((b"x-process-time", b"%.6f" % seconds))
    return [*headers, *added]


def last_response(error: ServiceError, server_headers: HeaderPairs) -> bytes:
    """The last response of a connection as bytes, to what never became a request.

    Args:
        error: What it reports.
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
    """The matched route's path with its parameters unfilled, or ``unmatched``."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else UNMATCHED


def _value(headers: HeaderPairs, name: bytes) -> bytes:
    """The first header of this name, which is lower case as they are; or nothing."""
    for header, value in headers:
        if header == name:
            return value
    return b""


def new_request_id() -> str:
    """A name for a request, as UUIDs without meaning are; asking the system costs more."""
    # Only a name: whoever guesses it knows nothing.
    return f"req-{random.getrandbits(128):032x}"  # nosec B311


def _request_id(headers: HeaderPairs) -> str:
    """The caller's id where it is harmless in a log, else a new one."""
    given = _value(headers, b"x-request-id").decode("latin-1")
    return given if given and _SANE_REQUEST_ID.fullmatch(given) else new_request_id()
