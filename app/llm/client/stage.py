"""What the engine process does before it is ready, for the log, the terminal and /status."""

import time

from app.core.log_queue import UNKNOWN
from app.core.logging import log_progress

_SHOWN_SECONDS = 2


class Stage:
    """The stage of loading that the engine process has reported last.

    Attributes:
        message: What is being done.
    """

    def __init__(self) -> None:
        self.message = "starting the engine process"
        self._percent: int | None = None
        self._since = time.monotonic()

    def reported(self, message: str, percent: int | None) -> None:
        """Take a report: what is being done, and how much of it is done where that is known."""
        self.message, self._percent, self._since = message, percent, time.monotonic()
        log_progress(message, percent)

    @property
    def text(self) -> str:
        """The message, and for how long it has been so where nothing else shows that time passes.

        Libraries tell nothing while they read a graph, compile it or try the model.
        """
        seconds = int(time.monotonic() - self._since)
        is_silent = self._percent is None and seconds >= _SHOWN_SECONDS
        return f"{self.message} ({seconds} s)" if is_silent else self.message

    def redraw(self) -> None:
        """Let a terminal show that time passes."""
        if (text := self.text) != self.message:
            log_progress(text, UNKNOWN)
