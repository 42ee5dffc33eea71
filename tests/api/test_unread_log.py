"""A log whose reader has stopped: what goes on, and what is counted."""

import time

from app.core.log_queue import MAX_LINES
from app.llm.engine.echo import WRITTEN_LINES
from tests.support.live import ask, generate
from tests.support.service import Service, running_service

# Lines of 100 bytes and more, which no pipe takes.
_A_PIPE_FULL = WRITTEN_LINES


def log_lines(service: Service, count: int) -> None:
    """Make the service log ``count`` lines: what its engine process writes is logged."""
    for _ in range(-(-count // WRITTEN_LINES)):
        answer = ask(service, generate("[echo:write] and goes on"))
        assert answer.json()["generated_text"] == "[echo:write] and goes on"


def dropped(service: Service, process: str) -> float:
    """Lines that a process has lost."""
    return service.metric("llm_log_records_dropped_total", process=process)


def test_nothing_waits_for_a_log_that_nobody_reads() -> None:
    """Probes and chats are answered, lost lines are counted, and a log that is read goes on."""
    with running_service(log_to="pipe") as service:
        service.log_is_read.clear()
        log_lines(service, MAX_LINES + 2 * _A_PIPE_FULL)
        assert service.get("/livez").status_code == 200
        assert ask(service, generate("hello")).json()["generated_text"] == "hello"
        # The last lines that the engine wrote may not have been read yet.
        service.wait_for(lambda: 0 < dropped(service, "api") == dropped(service, "api"), "the loss")
        lost = dropped(service, "api")
        service.log_is_read.set()
        # Until then the queue may still be full.
        service.wait_for(lambda: service.raw_log().count("\n") > MAX_LINES, "the lines that waited")
        with service.client() as client:
            client.get("/nothing", headers={"X-Request-ID": "again"})
        service.wait_for(lambda: '"again"' in service.raw_log(), "the next line")
        assert dropped(service, "api") == lost
        # Every line is whole.
        assert len(service.log()) > MAX_LINES


def test_sigterm_ends_a_service_whose_log_nobody_reads() -> None:
    """SIGTERM ends the service with status 0 while its log is full, and leaves no process."""
    with running_service(log_to="pipe") as service:
        service.log_is_read.clear()
        log_lines(service, _A_PIPE_FULL)
        started = time.monotonic()
        assert service.terminate() == 0
        assert time.monotonic() - started < 20
        assert not service.survivors()


def test_the_engine_does_not_wait_for_a_log_that_nobody_reads() -> None:
    """An engine whose log is full generates, counts what it lost, and ends by itself if it must."""
    with running_service(log_to="pipe") as service:
        service.log_is_read.clear()
        log_lines(service, _A_PIPE_FULL)
        answer = ask(service, generate("[echo:log] and goes on"))
        assert answer.json()["generated_text"] == "[echo:log] and goes on"
        assert dropped(service, "engine") > 0
        assert ask(service, generate("[echo:raise]")).status_code == 500
        service.wait_until_ready()
        assert ask(service, generate("hello")).json()["generated_text"] == "hello"
        service.log_is_read.set()
        ending = "the engine process ended: exit code 1"
        service.wait_for(lambda: ending in service.raw_log(), "the line of its end")
