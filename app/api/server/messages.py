"""Whole responses as bytes, for what is answered without the application."""

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from app.api.errors import error_response
from app.api.middleware import CLOSE, HeaderPairs, new_request_id, secured
from app.core.logging import request_id_var
from app.utils.errors import ServiceError


def whole_response(status: int, headers: HeaderPairs, body: bytes, *, last: bool) -> bytes:
    """A response as it is sent.

    Args:
        status: Its status code.
        headers: Its headers, in which nobody has put the end of a line.
        body: Its body, whose length is among them.
        last: Whether the connection ends with it, which another header says.
    """
    lines = [b"%s: %s\r\n" % pair for pair in (*headers, *([CLOSE] if last else []))]
    return b"".join([STATUS_LINE[status], *lines, b"\r\n", body])


def last_response(error: ServiceError, common: HeaderPairs, seconds: float) -> bytes:
    """The last response of a connection, to what never became a request.

    Args:
        error: What it tells.
        common: Headers that all responses have.
        seconds: Since it began to come.
    """
    request_id = new_request_id()
    token = request_id_var.set(request_id)
    response = error_response(error)
    request_id_var.reset(token)
    headers = [
        *common,
        *secured(response.raw_headers),
        (b"x-request-id", request_id.encode()),
        (b"x-process-time", b"%.6f" % seconds),
    ]
    return whole_response(error.status, headers, bytes(response.body), last=True)
