"""Fixtures for tests of the API: one fails a test that blocks the event loop."""

import traceback
from collections.abc import Iterator

import blockbuster.blockbuster as bb
import pytest
from blockbuster import blockbuster_ctx


@pytest.fixture(autouse=True)
def _event_loop_is_never_blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test during which the application blocks its event loop in this process."""
    blocked: list[str] = []

    class Noted(bb.BlockingError):
        """Noted in a list, because the application turns an exception of a handler into a 500."""

        def __init__(self, func: str) -> None:
            blocked.append("".join([f"{func}:\n", *traceback.format_stack()[-12:-2]]))
            super().__init__(func)

    monkeypatch.setattr(bb, "BlockingError", Noted)
    with blockbuster_ctx("app") as guard:
        # Tests build the application on the event loop, as uvicorn does. No request waits yet.
        guard.functions["io.TextIOWrapper.read"].can_block_in("app/main.py", "create_app")
        guard.functions["os.stat"].can_block_in("app/main.py", "create_app")
        # FastAPI looks for a route's source file at the first call of the route only.
        guard.functions["os.stat"].can_block_in("fastapi/routing.py", "_extract_endpoint_context")
        # coverage.py takes a lock of its own in whatever code it measures.
        for name in ("threading.Lock.acquire", "threading.Lock.acquire_lock"):
            guard.functions[name].can_block_in("coverage/collector.py", "lock_data")
        yield
    assert not blocked, "the event loop was blocked by " + "\n".join(blocked)
