"""The application under ``uvicorn --reload``: a start that fails is seen, and can be mended."""

import asyncio
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.errors import error_response
from app.api.middleware import new_request_id
from app.core.logging import get_logger, request_id_var
from app.utils.errors import EngineUnavailableError, StartupError

log = get_logger()

_LOOK_SECONDS = 0.5


def is_reloaded() -> bool:
    """Whether uvicorn's reloader has started this process."""
    return multiprocessing.parent_process() is not None and "--reload" in sys.argv


class ReloadedApplication:
    """Serves an application, or answers 503 with the reason why there is none.

    The reloader holds the port and waits for an edit while its child is gone, so a child that
    exited would leave a port that accepts connections and never answers them.

    Args:
        create: Builds the application; its argument is called with one line when the model cannot
            be served.
        files: Files beside the source code whose edit starts the service again. The reloader
            watches Python files alone, so this module's is touched then.
    """

    def __init__(
        self, create: Callable[[Callable[[str], None]], ASGIApp], files: Iterable[Path]
    ) -> None:
        self._files = list(files)
        # Taken before the files are read, so that no edit is missed.
        self._read_at = self._times()
        self._failure: str | None = None
        self._app: ASGIApp = Starlette()
        try:
            self._app = create(self._fail)
        except StartupError as error:
            self._fail(str(error))

    def _fail(self, message: str) -> None:
        log.critical(message)
        self._failure = message

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        if scope["type"] == "lifespan":
            watch = asyncio.create_task(self._watch(), name="settings-files")
            try:
                await self._app(scope, receive, send)
            finally:
                watch.cancel()
        elif self._failure is None:
            await self._app(scope, receive, send)
        else:
            token = request_id_var.set(new_request_id())
            response = error_response(EngineUnavailableError(self._failure))
            request_id_var.reset(token)
            await response(scope, receive, send)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self._times() != self._read_at:
                log.info("the settings have changed: starting again")
                _touch()
                return

    def _times(self) -> list[float | None]:
        """When each file was changed; ``None`` where it is missing."""
        return [path.stat().st_mtime if path.exists() else None for path in self._files]


def _touch() -> None:
    try:
        Path(__file__).touch()
    except OSError as error:
        log.error("touch a Python file to start again: %s", error)  # noqa: TRY400 - the message is complete
