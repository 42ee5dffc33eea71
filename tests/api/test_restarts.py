"""Rolling restarts behind a balancer, under load; `make restarts COUNT=50` does many."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tests.support.balancer import Balancer, load
from tests.support.service import running_service

CLIENTS = 12


@asynccontextmanager
async def instance(balancer: Balancer) -> AsyncIterator[None]:
    """A service behind the balancer, with the default time of notice.

    Leaving the block sends SIGTERM, and asserts that the service ends with 0 and leaves nothing.
    """
    running = running_service(ENGINE__ECHO_STEP_SECONDS="0.05", APP__SHUTDOWN_NOTICE_SECONDS="1")
    service = await asyncio.to_thread(running.__enter__)
    balancer.add(service)
    try:
        yield
    finally:
        await asyncio.to_thread(running.__exit__, None, None, None)
        await balancer.remove(service)


@pytest.mark.timeout(3600)
async def test_no_accepted_request_is_lost_in_rolling_restarts(
    pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Instances are replaced under load: every answer is complete, every exit status 0."""
    restarts: int = pytestconfig.getoption("--restarts")
    balancer = Balancer()
    async with AsyncExitStack() as last:
        old = AsyncExitStack()
        last.push_async_callback(lambda: old.aclose())  # noqa: PLW0108 - whichever is the last then
        await old.enter_async_context(instance(balancer))
        async with load(balancer, CLIENTS) as outcomes:
            for _ in range(restarts):
                new = AsyncExitStack()
                await new.enter_async_context(instance(balancer))
                before = outcomes.total()
                while outcomes.total() < before + 2 * CLIENTS:  # noqa: ASYNC110 - polls the clients
                    await asyncio.sleep(0.01)
                leaving, old = old, new
                await leaving.aclose()
    with capsys.disabled():
        print(f"\n{restarts} restarts: {dict(outcomes)}, {balancer.repeated} sent elsewhere")  # noqa: T201 - the answer of `make restarts`
    assert set(outcomes) == {"whole"}
