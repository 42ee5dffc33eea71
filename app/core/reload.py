"""SIGHUP reads the API keys again; no other setting changes."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable

from app.core.config import Settings, load_settings
from app.core.config.security import SecuritySettings
from app.core.logging import get_logger
from app.utils.errors import ConfigurationError

log = get_logger()


class reloading_on_hangup:  # noqa: N801 - a context manager, used like a function
    """While it is entered, SIGHUP loads the configuration and passes its keys to ``apply``.

    Running requests continue. A configuration with a fault changes nothing. A terminal that is
    closed sends SIGHUP too: the service then ends, as it would without this handler.

    Args:
        apply: Called with the new section ``security``.
        load: Reads the configuration.
    """

    def __init__(
        self,
        apply: Callable[[SecuritySettings], None],
        load: Callable[[], Settings] = load_settings,
    ) -> None:
        self._apply = apply
        self._load = load
        self._task: asyncio.Task[None] | None = None
        self._had_terminal = sys.stderr.isatty()

    def __enter__(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        except (ValueError, RuntimeError):
            # Signals cannot be handled outside the main thread, as in tests.
            return

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
        self._loop.remove_signal_handler(signal.SIGHUP)

    def _on_hangup(self) -> None:
        if self._had_terminal and not sys.stderr.isatty():
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._task = self._loop.create_task(self._reload())

    async def _reload(self) -> None:
        try:
            settings = await asyncio.to_thread(self._load)
        except ConfigurationError as error:
            log.error("SIGHUP: the API keys stay as they are: %s", error)  # noqa: TRY400 - the message is complete
            return
        except (OSError, ValueError) as error:
            # The message may hold a piece of the file, and that piece may be a key.
            log.error(  # noqa: TRY400 - see above
                "SIGHUP: the API keys stay as they are: the configuration cannot be read (%s)",
                type(error).__name__,
            )
            return
        self._apply(settings.security)
        names = [key.name for key in settings.security.accepted_keys]
        log.info("SIGHUP: API keys read again, %d accepted: %s", len(names), ", ".join(names))
