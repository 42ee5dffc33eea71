"""How long the server has for its connections once the service is told to stop."""

import asyncio
import logging
import signal

import pytest
import uvicorn

from app.core.config import AppSettings
from app.core.logging import LOGGER_NAME, TextFormatter, request_id_var
from app.core.shutdown import GracefulShutdown


class Work:
    """Work that ends when it is told to, or never by itself."""

    def __init__(self, *, is_idle: bool) -> None:
        self.is_idle = is_idle
        self.aborted = False

    def drain(self) -> None:
        """Nothing else comes anyway."""

    def abort_running(self) -> None:
        """Noted."""
        self.aborted = True

    def kill(self) -> None:
        """Only a second signal asks for that."""
        pytest.fail("killed")


# The second has work that takes longer than its grace.
async def terminated(work: Work, *, grace: float) -> uvicorn.Server:
    """A server that has been told to stop by SIGTERM's handler, in the present context.

    Not by a real signal, as tests/api/test_shutdown.py sends it: whatever went wrong with that
    would end the process of all these tests.
    """
    server = uvicorn.Server(uvicorn.Config(lambda: None, log_config=None))
    settings = AppSettings(shutdown_grace_seconds=grace, shutdown_notice_seconds=0)
    previous = signal.signal(signal.SIGTERM, server.handle_exit)
    try:
        with GracefulShutdown(work, settings):
            handler = signal.getsignal(signal.SIGTERM)
            assert callable(handler)
            handler(signal.SIGTERM, None)
            async with asyncio.timeout(20):
                while not server.should_exit:  # noqa: ASYNC110 - set by a signal
                    await asyncio.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return server


@pytest.mark.parametrize(("is_idle", "grace"), [(True, 30.25), (False, 0.25)])
async def test_connections_have_a_second_after_the_grace(is_idle: bool, grace: float) -> None:
    """The server is told to leave, with what is left of the grace and a second, not rounded up."""
    work = Work(is_idle=is_idle)
    server = await terminated(work, grace=grace)
    assert work.aborted
    seconds = server.config.timeout_graceful_shutdown
    assert seconds is not None
    if is_idle:
        assert 10 < seconds <= grace + 1
    else:
        assert seconds == 1


async def test_what_a_signal_logs_belongs_to_no_request(caplog: pytest.LogCaptureFixture) -> None:
    """A signal that interrupts a request's task begins a shutdown without that request's id."""
    caplog.handler.setFormatter(TextFormatter())
    caplog.set_level(logging.INFO, logger=LOGGER_NAME)
    token = request_id_var.set("req-interrupted")
    try:
        await terminated(Work(is_idle=True), grace=0)
    finally:
        request_id_var.reset(token)
    assert "draining: no new requests" in caplog.text
    assert "req-interrupted" not in caplog.text
