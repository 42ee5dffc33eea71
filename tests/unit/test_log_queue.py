"""The queue between the log and its descriptor: bounded, in order, and never in the way."""

import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from app.core.log_queue import MAX_LINES, LogQueue
from app.core.logging import TextFormatter, request_id_var

# More than a pipe takes besides the queue.
MANY = MAX_LINES + 5_000


@dataclass
class Pipe:
    """A log that goes into a pipe, which is read when the test does."""

    log: LogQueue
    reader: int
    writer: int

    def write(self, message: str) -> None:
        """Log a line."""
        self.log.handle(logging.makeLogRecord({"name": "x", "levelname": "INFO", "msg": message}))

    def lines(self, count: int) -> list[str]:
        """The next lines in the pipe."""
        text = ""
        while text.count("\n") < count:
            text += os.read(self.reader, 65_536).decode()
        return text.splitlines()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """A log into a pipe."""
    before = set(threading.enumerate())
    reader, writer = os.pipe()
    log = LogQueue(writer, logging.Formatter("%(message)s"))
    (thread,) = set(threading.enumerate()) - before
    yield Pipe(log, reader, writer)
    log.close()
    # A thread that is blocked in the pipe gets an error now, and ends.
    os.close(reader)
    thread.join(30)
    os.close(writer)


def test_lines_that_find_no_room_are_counted_and_no_others(pipe: Pipe) -> None:
    """Whoever logs is never held up; each line is either written, in order, or counted once."""
    for number in range(MANY):
        pipe.write(f"{number:020}")
    lost = pipe.log.take_dropped()
    assert lost > 0
    kept = [int(line) for line in pipe.lines(MANY - lost)]
    assert kept == sorted(set(kept))
    pipe.write("again")
    assert pipe.lines(1) == ["again"]
    assert pipe.log.take_dropped() == 0


def test_a_flush_has_an_end_though_nobody_reads(pipe: Pipe) -> None:
    """Flushing a log into a full pipe returns, and all lines are there when it is read."""
    for _ in range(5_000):
        pipe.write("x" * 30)
    pipe.log.flush()
    pipe.write("last")
    assert pipe.lines(5_001)[-1] == "last"


def test_a_flush_waits_for_what_was_logged(pipe: Pipe) -> None:
    """After a flush the lines before it are written."""
    pipe.write("one")
    pipe.write("two")
    pipe.log.flush()
    assert os.read(pipe.reader, 100) == b"one\ntwo\n"


def test_a_reader_that_is_gone_is_counted() -> None:
    """Lines that cannot be written are counted, and do not end the log."""
    reader, writer = os.pipe()
    os.close(reader)
    log = LogQueue(writer, logging.Formatter())
    for message in ("one", "two"):
        log.handle(logging.makeLogRecord({"msg": message}))
    log.flush()
    assert log.take_dropped() == 2
    log.close()
    os.close(writer)


def test_a_descriptor_that_does_not_block_loses_nothing(pipe: Pipe) -> None:
    """Where a full pipe is an error instead of a wait, its lines are written later."""
    os.set_blocking(pipe.writer, False)
    for number in range(8_000):
        pipe.write(f"{number:020}")
    assert [int(line) for line in pipe.lines(8_000)] == [*range(8_000)]
    assert pipe.log.take_dropped() == 0


def test_a_line_has_the_request_of_the_moment(pipe: Pipe) -> None:
    """The request's id is that of the time of logging, whenever the line is written."""
    pipe.log.setFormatter(TextFormatter())
    for name in ("req-1", "req-2"):
        token = request_id_var.set(name)
        pipe.write("x")
        request_id_var.reset(token)
    assert [line.rpartition(" ")[2] for line in pipe.lines(2)] == ["[req-1]", "[req-2]"]


def test_a_closed_log_leaves_no_thread() -> None:
    """Closing a log ends its thread, after the lines that were queued."""
    before = set(threading.enumerate())
    reader, writer = os.pipe()
    log = LogQueue(writer, logging.Formatter())
    log.handle(logging.makeLogRecord({"msg": "last"}))
    (thread,) = set(threading.enumerate()) - before
    log.close()
    thread.join(30)
    assert not thread.is_alive()
    assert os.read(reader, 100) == b"last\n"
    os.close(reader)
    os.close(writer)
