"""Log lines on their way to a descriptor, through a bounded queue and a thread.

A pipe that nobody reads takes 64 KiB, and then blocks its writer. Here that is a thread which does
nothing else: requests, probes and signals go on, and lines that find no room are counted.
"""

import logging
import os
import threading
import time
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from typing import Any

MAX_LINES = 10_000
"""Most lines that wait; at 300 bytes each these are 3 MB."""

PERCENT = "percent"
"""Member of a record of progress: how much is done."""
UNKNOWN = -1
"""That member where nobody knows; only terminals show such a record."""

_BAR = 20
# The beginning of the terminal's line, which is emptied. Each line is written so, because the bar
# may be another process's.
_NEW_LINE = "\r\033[K"
# Time for the last lines before an exit. The service kills an engine process after a second.
_FLUSH_SECONDS = 0.5
# How long to wait for a descriptor that does not block and has no room.
_RETRY_SECONDS = 0.05


class LogQueue(QueueHandler):
    """Formats a record where it was logged, since there its request is known, and queues the line.

    Args:
        descriptor: Where the lines go.
        formatter: Makes a line of a record.
        draws: Whether the descriptor is a terminal, where progress is one line that changes.
    """

    def __init__(
        self, descriptor: int, formatter: logging.Formatter, *, draws: bool = False
    ) -> None:
        # Unlike queue.Queue, it can be used by a destructor that runs while it is being used.
        self._lines: SimpleQueue[Any] = SimpleQueue()
        super().__init__(self._lines)
        self.setFormatter(formatter)
        self._descriptor, self._draws = descriptor, draws
        self._refused = self._told = 0
        self._writer = _Writer(self._lines, descriptor)
        self._writer.start()

    def prepare(self, record: logging.LogRecord) -> str:
        """The record's line, with its end."""
        if not self._draws:
            return f"{self.format(record)}\n"
        percent = getattr(record, PERCENT, None)
        if percent is None:
            return f"{_NEW_LINE}{self.format(record)}\n"
        done = "#" * round(percent * _BAR / 100)
        bar = "" if percent == UNKNOWN else f"[{done:-<{_BAR}}] "
        # A terminal of a program may have no size.
        width = (os.get_terminal_size(self._descriptor).columns or 80) - 1
        return _NEW_LINE + f"{bar}{record.getMessage()}"[:width]

    def enqueue(self, record: Any) -> None:
        """Queue a line, or count it where there is no room."""
        if self._lines.qsize() < MAX_LINES:
            self._lines.put(record)
        else:
            self._refused += 1

    def take_dropped(self) -> int:
        """How many lines have been lost since the last call."""
        self.acquire()
        lost = self._refused + self._writer.failed
        new, self._told = lost - self._told, lost
        self.release()
        return new

    def flush(self) -> None:
        """Wait until the lines so far are written, but no longer than half a second."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(_FLUSH_SECONDS)

    def close(self) -> None:
        """End the thread, once it has written what is queued."""
        self._writer.enqueue_sentinel()
        super().close()


class _Writer(QueueListener):
    """The thread, which the end of the process does not wait for.

    It writes to the descriptor itself. The interpreter's exit would wait for, or crash on, the lock
    of a file object whose writer is blocked.
    """

    def __init__(self, lines: "SimpleQueue[Any]", descriptor: int) -> None:
        super().__init__(lines)
        self._descriptor = descriptor
        self.failed = 0

    def handle(self, record: Any) -> None:
        """Write a line, or tell a waiting flush that all lines before it are written."""
        if isinstance(record, threading.Event):
            record.set()
            return
        data = str(record).encode("utf-8", "backslashreplace")
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:
                time.sleep(_RETRY_SECONDS)
            except OSError:
                # The disk is full, or the reader is gone; the next line may succeed.
                self.failed += 1
                return
