"""The guard of every route with a key: it identifies the caller before the body is read."""

import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, ClassVar

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.types import Receive, Scope

from app.api.accounts import accounted
from app.api.body import parse_json, unpack
from app.api.dependencies import Services, services_of
from app.api.errors import error_response, validation_error, with_errors
from app.api.idempotency import PARAMETER as IDEMPOTENCY_KEY
from app.api.idempotency import answer_once
from app.core.config.security import Scope as KeyScope
from app.core.security import Principal
from app.utils.errors import (
    IdempotencyKeyInUseError,
    IdempotencyKeyReusedError,
    InsufficientScopeError,
    InvalidAPIKeyError,
    ServiceError,
    StateUnavailableError,
)

# These are for the OpenAPI document only. The guard checks the key.
KEY_SCHEMES = [
    Depends(APIKeyHeader(name="X-API-Key", auto_error=False)),
    Depends(HTTPBearer(auto_error=False)),
]


class _ParsedRequest(Request):
    """A request whose body has been read and parsed.

    Raises:
        InvalidJSONError: On construction. FastAPI would turn any error of parsing into a bare 400.
    """

    def __init__(self, scope: Scope, receive: Receive, body: bytes) -> None:
        # The body is read as JSON whatever its content type says; FastAPI would reject it by that.
        headers = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
        super().__init__(
            {**scope, "headers": [*headers, (b"content-type", b"application/json")]}, receive
        )
        self._content = body
        self._value = parse_json(body)

    async def body(self) -> bytes:
        """The body's bytes."""
        return self._content

    async def json(self) -> Any:
        """The body's JSON."""
        return self._value


class GuardedRoute(APIRoute):
    """A route that identifies its caller before it reads the body.

    FastAPI reads and parses the body before any dependency runs, which would be too much work for
    a caller without a key. A route that takes a body takes an idempotency key too.

    Attributes:
        scope: The scope that the caller's key must have; ``None`` accepts any key.
        generates: Whether requests with a body need a place in the engine.
        param_names: What fields are called here, where a service's errors name them otherwise.
    """

    scope: ClassVar[KeyScope | None] = "infer"
    generates: ClassVar[bool] = False
    param_names: ClassVar[Mapping[str, str]] = {}

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if self.scope is not None:
            options["responses"] = with_errors(options.get("responses"), InsufficientScopeError)
        if "POST" in (options.get("methods") or ()):
            options["responses"] = with_errors(
                options.get("responses"),
                IdempotencyKeyInUseError,
                IdempotencyKeyReusedError,
                StateUnavailableError,
            )
            options["openapi_extra"] = {"parameters": [IDEMPOTENCY_KEY]}
        super().__init__(path, endpoint, **options)

    def refusal(self, faults: Sequence[Mapping[str, Any]]) -> ServiceError:
        """The error for what pydantic found wrong with a request."""
        return validation_error(faults)

    def status_of(self, error: ServiceError) -> int:
        """The status with which an error is answered on this route."""
        return error.status

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, behind the guard."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                response = await self._answer(request, handle)
                response.headers.update(_limit_headers(request))
            except RequestValidationError as error:
                response = self._refuse(request, self.refusal(error.errors()))
            except ServiceError as error:
                if (param := error.param or "") in self.param_names:
                    error.param = self.param_names[param]
                    error.message = re.sub(
                        rf"(?<![\w.]){param}(?=:| is )", error.param, error.message
                    )
                response = self._refuse(request, error)
            # A stream has set another.
            request.scope["state"].setdefault("outcome", response.status_code)
            return response

        return guarded

    async def _answer(
        self, request: Request, handle: Callable[[Request], Coroutine[Any, Any, Response]]
    ) -> Response:
        services = services_of(request)
        request.state.principal = caller = await identify(request, services)
        request.state.limit_headers = await services.limits.take(
            f"key:{caller.key_id}", reason="key"
        )
        if self.scope is not None:
            caller.require(self.scope)
        if self.body_field is None:
            return await handle(request)
        encoding = request.headers.get("content-encoding", "")
        body = unpack(await request.body(), encoding, services.settings.security.max_body_bytes)
        if self.generates:
            services.shedding.check(caller.key_id, request.headers, body)

        async def answer() -> Response:
            return await handle(_ParsedRequest(request.scope, request.receive, body))

        return await answer_once(services.state.idempotency, request, body, answer)

    def _refuse(self, request: Request, error: ServiceError) -> Response:
        error.status = self.status_of(error)
        error.headers.update(_limit_headers(request))
        return error_response(error)


def _limit_headers(request: Request) -> dict[str, str]:
    """The X-RateLimit headers of the answer; empty if no token was taken from a key's bucket."""
    headers: dict[str, str] = getattr(request.state, "limit_headers", {})
    return headers


class GeneratingRoute(GuardedRoute):
    """A route whose requests need a place in the engine, unless their answers are cached."""

    generates = True

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self.app = accounted(self.app)


class AnyKeyRoute(GuardedRoute):
    """A route for every key, whatever its scopes."""

    scope = None


async def identify(request: Request, services: Services) -> Principal:
    """The caller of a request.

    Raises:
        InvalidAPIKeyError: The key is missing or unknown. It costs the address a token.
        RateLimitExceededError: The address has no token left.
    """
    try:
        return services.keys.authenticate(request.headers)
    except InvalidAPIKeyError as error:
        address = services.addresses.of(request.scope.get("client"), request.headers)
        error.headers.update(await services.limits.take(f"ip:{address}", reason="ip"))
        raise
