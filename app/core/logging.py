"""Structured logging on standard error: one JSON object a line, or text for a terminal.

Prompts, answers and keys are never logged. Further members of an event are passed as ``extra=``. A
traceback shows the stack and the exception's type, but not its message, because a library may have
put a piece of a prompt into it. Code that knows that there is none logs the message itself.
"""

import logging
import os
import time
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from app.core.config.logging import LoggingSettings
from app.core.log_queue import PERCENT, LogQueue
from app.utils.timing import utc_timestamp

LOGGER_NAME = "llm_service"
AUDIT = "audit"
"""The logger of who asked for what, see ``logging.audit``."""
STDERR = 2
"""The descriptor of standard error."""

request_id_var: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that is being served; set by the outermost middleware."""

trace_var: ContextVar[dict[str, str] | None] = ContextVar("trace", default=None)
"""Members that name the request's span in each of its lines, where it is traced."""

_PERCENT_STEP = 5
# Libraries whose lines at INFO are noise, or repeat the access log.
_QUIET = ("httpx", "httpcore", "huggingface_hub", "transformers", "filelock", "sse_starlette")


def get_logger(name: str | None = None) -> logging.Logger:
    """The service's logger, or a child of it."""
    return logging.getLogger(f"{LOGGER_NAME}.{name}" if name else LOGGER_NAME)


def log_progress(message: str, percent: int | None = None) -> None:
    """Log how far something is: a bar at a terminal, else a line every few per cent.

    Without ``percent`` it is a line everywhere. A terminal alone shows one whose ``percent`` is
    :data:`~app.core.log_queue.UNKNOWN`.
    """
    get_logger("engine").info(message, extra={} if percent is None else {PERCENT: percent})


class _FewPercents(logging.Filter):
    """Leaves out progress of less than five per cent."""

    _told = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether ``record`` is to be written."""
        percent = getattr(record, PERCENT, None)
        if percent is None:
            return True
        if percent < self._told:
            self._told = 0
        if percent < self._told + _PERCENT_STEP:
            return False
        self._told = percent
        return True


class _WithoutMessages(logging.Formatter):
    """Renders exceptions without their messages."""

    def formatException(self, ei: Any) -> str:  # noqa: N802 - the interface
        """The stack of an exception and of its causes."""
        return "\n".join(_traceback_lines(ei[1], set()))


def _traceback_lines(error: BaseException | None, seen: set[int]) -> Iterator[str]:
    if error is None or id(error) in seen:
        return
    seen.add(id(error))
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if before is not None:
        yield from _traceback_lines(before, seen)
        yield "which led to"
    yield "Traceback (most recent call last):"
    yield from (line.rstrip() for line in traceback.format_tb(error.__traceback__))
    yield f"{type(error).__module__}.{type(error).__qualname__}"
    for inner in getattr(error, "exceptions", ()):
        yield "of which one is"
        yield from _traceback_lines(inner, seen)


class ServiceJsonFormatter(_WithoutMessages, JsonFormatter):
    """The shape in README.md: timestamp, level, logger, message, then the members of ``extra``."""

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        """Fill ``log_data`` in the order of printing."""
        log_data["timestamp"] = utc_timestamp(record.created)
        log_data["level"] = record.levelname
        log_data["logger"] = record.name
        log_data["message"] = record.getMessage()
        if request_id := request_id_var.get():
            log_data["request_id"] = request_id
        log_data.update(trace_var.get() or {})
        super().add_fields(log_data, record, message_dict)
        # uvicorn repeats its messages here with a terminal's escape codes.
        log_data.pop("color_message", None)


class TextFormatter(_WithoutMessages):
    """One line an event for a terminal, with control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Render ``record``; a traceback follows on further lines."""
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        message = record.getMessage().encode("unicode_escape").decode("ascii")
        request_id = request_id_var.get()
        suffix = f" [{request_id}]" if request_id else ""
        line = f"{stamp} {record.levelname:<7} {record.name}: {message}{suffix}"
        if record.exc_info:
            line = f"{line}\n{self.formatException(record.exc_info)}"
        return line


def configure_logging(settings: LoggingSettings, descriptor: int = STDERR) -> LogQueue:
    """Send the lines of every logger, and Python's warnings, to ``descriptor``.

    The lines of the last moment are written by :func:`logging.shutdown`, which an ordinary exit
    calls; before ``os._exit`` the caller has to.
    """
    root = logging.getLogger()
    for before in root.handlers:
        if isinstance(before, LogQueue):
            before.close()
    is_terminal = os.isatty(descriptor)
    is_text = settings.format == "text" or (settings.format == "auto" and is_terminal)
    formatter = TextFormatter() if is_text else ServiceJsonFormatter()
    draws = is_text and is_terminal
    handler = LogQueue(descriptor, formatter, draws=draws)
    if not draws:
        handler.addFilter(_FewPercents())
    root.handlers[:] = [handler]
    logging.captureWarnings(True)
    root.setLevel(logging.WARNING)
    get_logger().setLevel(settings.level)
    get_logger(AUDIT).setLevel(logging.INFO if settings.audit else logging.CRITICAL)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    # The middleware writes the access log, with the request id and the latency.
    access = logging.getLogger("uvicorn.access")
    access.handlers.clear()
    access.propagate = False
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    return handler
