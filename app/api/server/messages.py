"""Whole responses as bytes, for what is answered without the application."""

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from app.api.errors import error_response
from app.api.middleware import CLOSE, HeaderPairs, common_headers, new_request_id
from app.core.logging import request_id_var
from app.utils.errors import ServiceError


def last_response(error: ServiceError, server_headers: HeaderPairs, seconds: float) -> bytes:
    """The last response of a connection, to what never became a request.

    Args:
        error: What it tells.
        server_headers: Headers that the server adds to every response.
        seconds: Since it began to come.
    """
    request_id = new_request_id()
    token = request_id_var.set(request_id)
    response = error_response(error)
    request_id_var.reset(token)
    headers = common_headers(response.raw_headers, request_id, seconds)
    lines = [b"%s: %s\r\n" % pair for pair in (*server_headers, *headers, CLOSE)]
    return b"".join([STATUS_LINE[error.status], *lines, b"\r\n", response.body])
