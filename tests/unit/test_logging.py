"""The log's formatters: shape, escaping, and the loggers that use them."""

import json
import logging
import os
import pty
import sys
import termios
from collections.abc import Iterator
from typing import Any

import pytest

from app.core.config.logging import LoggingSettings
from app.core.log_queue import UNKNOWN
from app.core.logging import (
    ServiceJsonFormatter,
    TextFormatter,
    configure_logging,
    get_logger,
    log_progress,
    request_id_var,
)
from tests.conftest import flush_log, restored_logging

NASTY = 'a\nb\r\nc\u2028d\x1b[31m"e" {"level": "CRITICAL"}'


def record(message: str, *arguments: Any, **extra: Any) -> logging.LogRecord:
    """A record made by a logger."""
    logger = logging.getLogger("llm_service.test")
    return logger.makeRecord(
        logger.name, logging.INFO, "file.py", 1, message, arguments, None, extra=extra
    )


def with_traceback() -> logging.LogRecord:
    """A record of an exception."""
    try:
        raise ValueError(NASTY)
    except ValueError:
        made = record("failed")
        made.exc_info = sys.exc_info()
        return made


@pytest.fixture
def request_id() -> Iterator[str]:
    """Set the id of a request that is being served."""
    token = request_id_var.set("req-7")
    yield "req-7"
    request_id_var.reset(token)


def test_json_has_the_documents_members_in_order(request_id: str) -> None:
    """timestamp, level, logger and message come first, then the request's id and the extras."""
    made = record("%s %s - %d", "POST", "/v1/chat", 200, status_code=200, latency_ms=1.5)
    made.created = 1_704_110_400.25
    line = ServiceJsonFormatter().format(made)
    assert list(json.loads(line).items()) == [
        ("timestamp", "2024-01-01T12:00:00.250Z"),
        ("level", "INFO"),
        ("logger", "llm_service.test"),
        ("message", "POST /v1/chat - 200"),
        ("request_id", request_id),
        ("status_code", 200),
        ("latency_ms", 1.5),
    ]


def test_json_outside_a_request_has_no_request_id() -> None:
    """An event outside a request has no member request_id."""
    assert "request_id" not in json.loads(ServiceJsonFormatter().format(record("started")))


@pytest.mark.parametrize("made", [record(NASTY), record("%s", NASTY), record("x", extra=NASTY)])
def test_json_is_one_line_whatever_it_carries(made: logging.LogRecord) -> None:
    """Line breaks and quotes in a message or a member neither begin a line nor end a member."""
    line = ServiceJsonFormatter().format(made)
    assert len(line.splitlines()) == 1
    event = json.loads(line)
    assert NASTY in (event["message"], event.get("extra"))
    assert event["level"] == "INFO"


def test_a_traceback_is_one_member() -> None:
    """An exception's traceback stays inside the line of its event."""
    line = ServiceJsonFormatter().format(with_traceback())
    assert len(line.splitlines()) == 1
    assert "ValueError" in json.loads(line)["exc_info"]


def raise_in_many_ways() -> None:
    """An exception with a cause, a context, a group and notes, each of which holds NASTY."""
    try:
        try:
            raise KeyError(NASTY)
        except KeyError as error:
            error.add_note(NASTY)
            raise TypeError(NASTY) from error
    except TypeError:
        raise ExceptionGroup(NASTY, [ValueError(NASTY), OSError(2, NASTY, NASTY)])  # noqa: B904 - its context is the point


@pytest.mark.parametrize("formatter", [ServiceJsonFormatter(), TextFormatter()])
def test_a_traceback_has_no_messages(formatter: logging.Formatter) -> None:
    """Types and stacks of an exception and its causes are logged, but no messages."""
    made = record("failed")
    try:
        raise_in_many_ways()
    except ExceptionGroup:
        made.exc_info = sys.exc_info()
    text = formatter.format(made)
    for kind in ("KeyError", "TypeError", "ExceptionGroup", "ValueError", "FileNotFoundError"):
        assert f"builtins.{kind}" in text
    assert "raise_in_many_ways" in text
    assert "CRITICAL" not in text


def test_a_cycle_of_causes_ends() -> None:
    """An exception that is its own cause is logged once."""
    error = ValueError("x")
    error.__cause__ = error
    made = record("failed")
    made.exc_info = (ValueError, error, None)
    assert TextFormatter().format(made).count("builtins.ValueError") == 1


def test_json_has_no_colours() -> None:
    """The coloured copy of a message that uvicorn adds is left out."""
    event = json.loads(ServiceJsonFormatter().format(record("x", color_message="\x1b[36mx")))
    assert "color_message" not in event


def test_text_escapes_control_characters(request_id: str) -> None:
    """A message in the text format is one line, with control characters escaped."""
    line = TextFormatter().format(record(NASTY))
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    assert line.endswith(f"[{request_id}]")
    assert "INFO    llm_service.test: a\\nb" in line


def test_text_shows_tracebacks() -> None:
    """In the text format a traceback follows on further lines."""
    lines = TextFormatter().format(with_traceback()).splitlines()
    assert lines[0].endswith("llm_service.test: failed")
    assert lines[1] == "Traceback (most recent call last):"


@pytest.fixture
def restored() -> Iterator[None]:
    """Restore the root logger's handlers and the levels that configure_logging changes."""
    names = ("uvicorn", "uvicorn.error", "uvicorn.access", "llm_service", "httpx", None)
    before = [(logging.getLogger(n), logging.getLogger(n).level) for n in names]
    with restored_logging():
        yield
    for logger, level in before:
        logger.setLevel(level)
        logger.propagate = True


@pytest.mark.usefixtures("restored")
def test_every_logger_writes_through_one_handler(capfd: pytest.CaptureFixture[str]) -> None:
    """Events of the service, uvicorn and libraries are each written once to standard error."""
    logging.getLogger("uvicorn.error").addHandler(logging.StreamHandler())
    logging.getLogger("uvicorn.error").setLevel("INFO")
    configure_logging(LoggingSettings())
    get_logger().info("ours")
    get_logger("engine").info("the engine's")
    logging.getLogger("uvicorn.error").info("the server's")
    logging.getLogger("some.library").warning("a library's")
    flush_log()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert [json.loads(line)["message"] for line in captured.err.splitlines()] == [
        "ours",
        "the engine's",
        "the server's",
        "a library's",
    ]


def written(settings: LoggingSettings, descriptor: int, reader: int) -> str:
    """What the log writes of a download in steps of one per cent, a wait, and a line after it."""
    configure_logging(settings, descriptor)
    for percent in range(101):
        log_progress(f"downloading: {percent} %", percent)
    log_progress("compiling (12 s)", UNKNOWN)
    get_logger().info("ready")
    text = ""
    while "ready" not in text:
        text += os.read(reader, 65_536).decode()
    return text


@pytest.mark.usefixtures("restored")
def test_progress_is_a_line_every_few_per_cent() -> None:
    """Where the log is no terminal, auto is JSON, with a line for each five per cent alone."""
    reader, writer = os.pipe()
    lines = [json.loads(line) for line in written(LoggingSettings(), writer, reader).splitlines()]
    assert [line["percent"] for line in lines[:-1]] == [*range(5, 101, 5)]
    assert lines[-1]["message"] == "ready"
    os.close(reader)
    os.close(writer)


@pytest.mark.usefixtures("restored")
def test_progress_is_a_bar_at_a_terminal() -> None:
    """At a terminal auto is text, and a download is one line that changes and then disappears."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 30))
    shown = written(LoggingSettings(), writer, reader)
    first, *steps, last = shown.split("\r\x1b[K")
    assert (first, len(steps)) == ("", 102)
    assert steps[50] == "[##########----------] downloading: 50 %"[:29]
    assert steps[101] == "compiling (12 s)"
    assert last.strip().endswith("INFO    llm_service: ready")
    os.close(reader)
    os.close(writer)


@pytest.mark.usefixtures("restored")
def test_noise_is_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    """The server's access log, libraries' INFO and levels under the configured one are left out."""
    configure_logging(LoggingSettings(level="WARNING", format="text"))
    get_logger().info("ours")
    logging.getLogger("uvicorn.access").info("GET /?key=secret")
    logging.getLogger("httpx").info("HTTP Request: GET")
    logging.getLogger("some.library").info("hello")
    get_logger().warning("kept")
    flush_log()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("WARNING llm_service: kept")


def test_loggers_are_named_after_the_service() -> None:
    """The service's logger has the name of the user's document, and its children that prefix."""
    assert get_logger().name == "llm_service"
    assert get_logger("engine").name == "llm_service.engine"
