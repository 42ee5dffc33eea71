"""Pure ASGI middleware: request id, timing, metrics, access log, crashes, body limit."""

import re
import uuid
from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import METHODS, error_response
from app.core.logging import get_logger, request_id_var
from app.core.metrics import Metrics
from app.utils.errors import BodyTooLargeError, InternalError
from app.utils.timing import Stopwatch

log = get_logger()

UNMATCHED = "unmatched"
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_SECURITY_HEADERS = (
    ("Cache-Control", "no-store"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
)
# What is no page needs nothing; a page, such as /docs, brings its scripts, but nobody's frame.
_DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"
_PAGE_POLICY = "base-uri 'none'; frame-ancestors 'none'; object-src 'none'"
# Called every few seconds by machines; they would drown what people want to read.
_QUIET_ROUTES = frozenset({"/health", "/livez", "/readyz", "/metrics"})


class RequestContextMiddleware:
    """Gives each request an id and a clock, and tells what became of it.

    It is the outermost layer, so that even a crash is answered in the one error shape, with
    the headers every response has.
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
        watch = Stopwatch()
        request_id = _request_id(Headers(scope=scope))
        token = request_id_var.set(request_id)
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["X-Process-Time"] = f"{watch.seconds:.6f}"
                if self._leaving():
                    # A request sent down this connection later would cross with its end.
                    headers["Connection"] = "close"
                secure(headers)
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
            self._record(scope, status, watch.seconds)
            request_id_var.reset(token)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = route_template(scope)
        # Without a status the client left before there was anything to answer.
        code = status or 499
        # Anybody can try every method on every route, and each pair would have its histogram.
        endpoint = UNMATCHED if code == HTTPStatus.METHOD_NOT_ALLOWED else route
        self._metrics.http_requests.labels(method, endpoint, str(code)).inc()
        self._metrics.http_duration.labels(method, endpoint).observe(seconds)
        write = log.debug if route in _QUIET_ROUTES else log.info
        write(
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


def secure(headers: MutableHeaders) -> None:
    """Tell browsers and proxies what they may do with a response; its own headers go first."""
    for name, value in _SECURITY_HEADERS:
        headers.setdefault(name, value)
    is_page = headers.get("content-type", "").startswith("text/html")
    headers.setdefault("Content-Security-Policy", _PAGE_POLICY if is_page else _DATA_POLICY)


def route_template(scope: Scope) -> str:
    """The matched route's path with its parameters unfilled, or ``unmatched``."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else UNMATCHED


def _request_id(headers: Headers) -> str:
    """The caller's id where it is harmless in a log, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _SANE_REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
