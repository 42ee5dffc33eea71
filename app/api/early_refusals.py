"""Refusing before a request is one of the application's: in its connection, as soon as it has come.

While the engine is full most requests are refused, and what a refusal costs is taken from the
answers of the others. The way through the server's task for each request, the application's layers
and the framework's router costs more than the refusal itself (docs/adr/0021-load-shedding.md).
"""

from dataclasses import dataclass

from fastapi import FastAPI
from starlette.requests import Request
from starlette.types import Scope

from app.api.dependencies import GuardedRoute, Services
from app.api.errors import error_response
from app.api.middleware import HeaderList, RequestLog, request_id_of
from app.core.logging import get_logger, request_id_var
from app.utils.errors import InternalError, ServiceError
from app.utils.timing import Stopwatch

log = get_logger()


@dataclass(frozen=True, slots=True)
class Refusal:
    """A whole response.

    Attributes:
        status: Its status code.
        headers: All of its headers, as bytes.
        body: Its body.
    """

    status: int
    headers: HeaderList
    body: bytes


class EarlyRefusals:
    """Asks a route's own guard about requests that have not been routed yet.

    What the guard lets in goes on to the application, where it does not ask again.
    """

    def __init__(self, app: FastAPI, services: Services, requests: RequestLog) -> None:
        """Know the routes that ``app`` has now.

        Args:
            app: The application.
            services: Its services.
            requests: Where refusals are told, as all other requests.
        """
        self._app = app
        self._shedding = services.shedding
        self._max_bytes = services.settings.security.max_body_bytes
        self._log = requests
        self._routes = {
            (method, route.path): route
            for route in app.routes
            if isinstance(route, GuardedRoute) and route.generates and not route.param_convertors
            for method in route.methods or ()
        }

    @property
    def are_near(self) -> bool:
        """Whether some caller would be refused now; otherwise there is nothing to gain."""
        return self._shedding.is_near

    def find(self, scope: Scope, body: bytes) -> Refusal | None:
        """The refusal of a request that has come whole, or ``None``: then it goes on.

        Args:
            scope: The request's, in which stands from then on that it was let in.
            body: Its body.
        """
        path = scope["path"].removeprefix(scope["root_path"])
        route = self._routes.get((scope["method"], path))
        if route is None or len(body) > self._max_bytes:
            return None
        watch = Stopwatch()
        request_id = request_id_of(scope["headers"])
        token = request_id_var.set(request_id)
        try:
            scope["app"] = self._app
            request = Request(scope)
            try:
                route.enter_whole(request, body)
            except ServiceError as error:
                response = route.refuse(request, error)
            except Exception:
                log.exception("unhandled exception")
                response = error_response(InternalError())
            else:
                return None
            # The router has not said so.
            scope["route"] = route
            seconds = watch.seconds
            headers = self._log.headers(response.raw_headers, request_id, seconds)
            self._log.record(scope, response.status_code, seconds)
        finally:
            request_id_var.reset(token)
        return Refusal(response.status_code, headers, bytes(response.body))
