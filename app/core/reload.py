"""SIGHUP reads the API keys again; no other setting changes."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from app.core.config import load_settings
from app.core.config.security import SecuritySettings
from app.core.logging import get_logger
from app.utils.errors import ConfigurationError

log = get_logger()


@contextmanager
def reloading_on_hangup(apply: Callable[[SecuritySettings], None]) -> Iterator[None]:
    """Inside it, SIGHUP loads the configuration and passes its section ``security`` to ``apply``.

    Running requests continue. A configuration with a fault changes nothing. A terminal that is
    closed sends SIGHUP too: the service then ends, as it would without this handler.
    """
    loop = asyncio.get_running_loop()
    had_terminal = sys.stderr.isatty()
    tasks: list[asyncio.Task[None]] = []

    def on_hangup() -> None:
        if had_terminal and not sys.stderr.isatty():
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            tasks[:] = [loop.create_task(_reload(apply))]

    # Outside the main thread no signal can be handled; uvloop raises for an end of that too.
    not_the_main_thread = suppress(ValueError, RuntimeError)
    with not_the_main_thread:
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        with not_the_main_thread:
            loop.remove_signal_handler(signal.SIGHUP)


async def _reload(apply: Callable[[SecuritySettings], None]) -> None:
    try:
        settings = await asyncio.to_thread(load_settings)
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
    apply(settings.security)
    names = [key.name for key in settings.security.accepted_keys]
    log.info("SIGHUP: API keys read again, %d accepted: %s", len(names), ", ".join(names))
