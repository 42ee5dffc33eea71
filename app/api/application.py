"""The application, which bounds the connections of the server that runs it."""

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

_DEFAULT_KEEP_ALIVE = 5  # uvicorn's


class GuardedApplication(FastAPI):
    """An application that puts :class:`GuardedProtocol` under the server that runs it.

    ``uvicorn app.main:app`` names no protocol, and must be as safe as any other start. uvicorn
    begins the lifespan before it accepts a connection, and the lifespan's ``receive`` is a method
    of an object with the server's configuration, which names the class of connections.

    Attributes:
        address: Where a person finds the service; ``None`` where uvicorn does not say it.
    """

    def __init__(self, *, connections: Connections, **options: Any) -> None:
        super().__init__(redirect_slashes=False, **options)
        self._connections = connections
        self.address: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        if scope["type"] != "lifespan":
            # Starlette would redirect an address that ends with a slash, to http:// behind a proxy.
            scope["path"] = scope["path"].rstrip("/") or "/"
            await super().__call__(scope, receive, send)
            return
        config: Any = getattr(getattr(receive, "__self__", None), "config", None)
        if isinstance(config, Config) and config.http_protocol_class is HttpToolsProtocol:
            self.address = _address(config)
            config.http_protocol_class = cast("Any", partial(GuardedProtocol, self._connections))
            if config.timeout_keep_alive != _DEFAULT_KEEP_ALIVE:
                log.warning("--timeout-keep-alive is not used: see server.keep_alive_seconds")
        else:
            log.warning("connections are not bounded: the server is not uvicorn with httptools")
        watch = asyncio.create_task(self._connections.watch(), name="connections")
        try:
            await super().__call__(scope, receive, send)
        finally:
            watch.cancel()


def _address(config: Config) -> str | None:
    if config.uds is not None or config.fd is not None or not config.port:
        return None
    # An unspecified address is every one of this machine.
    name = "localhost" if config.host in ("", "0.0.0.0", "::") else config.host  # noqa: S104 # nosec B104
    host = f"[{name}]" if ":" in name else name
    return f"{'https' if config.is_ssl else 'http'}://{host}:{config.port}/"
