"""Puts the service's own protocol under the server that runs the application."""

import asyncio
from functools import partial
from typing import Any, cast

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.server.connections import Connections
from app.api.server.protocol import GuardedProtocol
from app.core.logging import get_logger

log = get_logger()

_DEFAULT_KEEP_ALIVE = 5


class GuardedApplication(FastAPI):
    """An application that bounds its server's connections for as long as it runs.

    ``uvicorn app.main:app`` names no protocol, and must be as safe as any other start. uvicorn
    begins the lifespan before it takes the first connection, the lifespan's ``receive`` is a
    method of an object that holds the server's configuration, and the class named in there is
    asked for each connection's protocol.
    """

    def __init__(self, *, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._connections = connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        if scope["type"] != "lifespan":
            await super().__call__(scope, receive, send)
            return
        if not self._install(receive):
            log.warning("connections are not bounded: the server is not uvicorn with httptools")
        watch = asyncio.create_task(self._connections.watch(), name="connections")
        try:
            await super().__call__(scope, receive, send)
        finally:
            watch.cancel()

    def _install(self, receive: Receive) -> bool:
        config = getattr(getattr(receive, "__self__", None), "config", None)
        if not isinstance(config, Config) or config.http_protocol_class is not HttpToolsProtocol:
            return False
        if config.timeout_keep_alive != _DEFAULT_KEEP_ALIVE:
            log.warning("uvicorn's --timeout-keep-alive is not used: see server.keep_alive_seconds")
        protocol = partial(GuardedProtocol, self._connections)
        config.http_protocol_class = cast("Any", protocol)
        return True
