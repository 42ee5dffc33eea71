"""SIGHUP's handler, on the event loops and threads that an application may run on."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvloop

from app.core.reload import reloading_on_hangup


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_application_can_leave_on_any_thread(
    make_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """Outside the main thread, where no signal can be handled, nothing raises."""

    async def enter_and_leave() -> bool:
        with reloading_on_hangup(lambda _: None):
            return True

    def run() -> bool:
        with asyncio.Runner(loop_factory=make_loop) as runner:
            return runner.run(enter_and_leave())

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result()
