"""What the API's tests share: a guard against blocking the event loop."""

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
        """Remembered, since the application answers what a handler raises with a 500."""

        def __init__(self, func: str) -> None:
            blocked.append("".join([f"{func}:\n", *traceback.format_stack()[-12:-2]]))
            super().__init__(func)

    monkeypatch.setattr(bb, "BlockingError", Noted)
    with blockbuster_ctx("app") as guard:
        # Building the application, which tests do on the loop as uvicorn does: nobody waits yet.
        guard.functions["io.TextIOWrapper.read"].can_block_in("app/main.py", "create_app")
        guard.functions["os.stat"].can_block_in("app/main.py", "create_app")
        # FastAPI looks for a route's source file the first time the route is called, and once.
        guard.functions["os.stat"].can_block_in("fastapi/routing.py", "_extract_endpoint_context")
        # The measuring of coverage itself has a lock, which it takes wherever it happens to be.
        for name in ("threading.Lock.acquire", "threading.Lock.acquire_lock"):
            guard.functions[name].can_block_in("coverage/collector.py", "lock_data")
        yield
    assert not blocked, "the event loop was blocked by " + "\n".join(blocked)
