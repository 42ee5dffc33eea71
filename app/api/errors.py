"""Turns every exception into the one error shape."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.routing import Match

from app.core.logging import get_logger, request_id_var
from app.utils.errors import (
    InternalError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    PromptTooLongError,
    ServiceError,
    ValidationFailedError,
)

log = get_logger()

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
"""Methods that an address may answer; metrics count all others as one."""

# Most faults in a message, and most characters of a field's name. Both come from the caller.
_MAX_FAULTS = 3
_MAX_NAME = 64
# pydantic puts the members of a union into an error's location, as type names that mean nothing
# to a caller.
_UNION_MEMBER = re.compile(r"str|constrained-str|(list|literal|function-wrap)\[.*|[A-Z]\w*Choice")


class ErrorBody(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(extra="allow")

    message: str
    type: str
    param: str | None
    code: str
    request_id: str


class ErrorResponse(BaseModel):
    """The one error shape of every route."""

    error: ErrorBody


def error_content(error: ServiceError) -> dict[str, Any]:
    """The JSON object of ``error``, for a response or a stream."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
            "request_id": request_id_var.get(),
            **error.details,
        }
    }


def error_response(error: ServiceError) -> Response:
    """The HTTP response of ``error``."""
    return Response(
        msgspec.json.encode(error_content(error)),
        status_code=error.status,
        media_type="application/json",
        headers=error.headers,
    )


def validation_error(faults: Sequence[Mapping[str, Any]]) -> ServiceError:
    """The error for what pydantic found wrong with a request, without the caller's values."""
    described = [_describe(fault) for fault in faults[:_MAX_FAULTS]]
    more = f"; and {len(faults) - _MAX_FAULTS} more" if len(faults) > _MAX_FAULTS else ""
    param = described[0][0] if described else None
    message = "; ".join(f"{name}: {text}" if name else text for name, text in described)
    return ValidationFailedError(message + more, param=param)


def _describe(fault: Mapping[str, Any]) -> tuple[str | None, str]:
    _, *parts = fault["loc"]
    if len(parts) > 1 and _UNION_MEMBER.fullmatch(str(parts[1])):
        del parts[1]
    name = ".".join(str(part)[:_MAX_NAME] for part in parts).encode("ascii", "replace").decode()
    text = str(fault["msg"]).removeprefix("Value error, ")
    return name or None, text


async def _on_service_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)  # noqa: S101 - registered for nothing else  # nosec B101
    return error_response(error)


async def _on_validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for nothing else  # nosec B101
    return error_response(validation_error(error.errors()))


def _allowed_methods(request: Request) -> str:
    """The methods that an address answers, as in the header Allow (RFC 9110, 10.2.1).

    Starlette lists only those of the first route at the address, but each method may have its own.
    """

    def is_answered(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return ", ".join(filter(is_answered, METHODS))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for nothing else  # nosec B101
    known: dict[int, ServiceError] = {404: NotFoundError(), 405: MethodNotAllowedError()}
    fallback = InternalError() if error.status_code >= 500 else InvalidRequestError()
    translated = known.get(error.status_code, fallback)
    translated.headers.update(error.headers or {})
    if error.status_code == 405:
        translated.headers["Allow"] = _allowed_methods(request)
    return error_response(translated)


def register_error_handlers(app: FastAPI) -> None:
    """Make ``app`` answer every exception in the one shape."""
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A JSON object; the last is [DONE]."}},
    "required": ["data"],
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": _EVENT}}}
}
"""The declared response of a route that can stream."""


def responses(
    *errors: type[ServiceError], bad_request: bool = False
) -> dict[int | str, dict[str, Any]]:
    """The errors that a route declares in the OpenAPI document.

    Args:
        errors: The errors that it may answer.
        bad_request: Whether it is one of OpenAI's routes, see :func:`openai_status`.
    """
    statuses = map(openai_status, errors) if bad_request else (e.status for e in errors)
    return _declare({}, zip(statuses, errors, strict=True))


def with_errors(
    declared: Mapping[int | str, dict[str, Any]] | None, *errors: type[ServiceError]
) -> dict[int | str, dict[str, Any]]:
    """The responses that a route declares already, and more errors."""
    by_status = {status: dict(response) for status, response in (declared or {}).items()}
    return _declare(by_status, ((e.status, e) for e in errors))


def openai_status(error: ServiceError | type[ServiceError]) -> int:
    """The status of an error on OpenAI's routes, where every mistake in a body is 400."""
    kind = error if isinstance(error, type) else type(error)
    is_about_body = issubclass(kind, (ValidationFailedError, PromptTooLongError))
    return 400 if is_about_body else error.status


def _declare(
    by_status: dict[int | str, dict[str, Any]],
    errors: Iterable[tuple[int, type[ServiceError]]],
) -> dict[int | str, dict[str, Any]]:
    for status, error in errors:
        codes = by_status.setdefault(status, {"model": ErrorResponse, "description": ""})
        codes["description"] = ", ".join(filter(None, (codes["description"], error.code)))
    return by_status
