"""Cases made from the OpenAPI document, against the application in this process.

Everything schemathesis has is on: its examples, every boundary of every field, random data that
fits the document and data that does not, and chains of requests along the document's links.
"""

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import schemathesis
from schemathesis.engine import Status, events, from_schema
from schemathesis.python.asgi import shutdown_lifespans
from schemathesis.specs.openapi.checks import negative_data_rejection

from app.llm.client.client import EngineState
from app.main import create_app
from tests.conftest import make_settings
from tests.support.service import API_KEY, START_SECONDS

# Beside its examples and boundaries, of which there are about 2,800 cases, whatever is asked for.
_OPERATIONS = 18
_SETTLE_SECONDS = 5.0
# sse-starlette starts one for each event loop, with the first stream.
_MAY_STAY = Counter(["<coroutine object _shutdown_watcher"])
_CHECKS = {
    # The document tells nothing of rules between fields; docs/api.md does.
    "positive_data_acceptance": {"enabled": False},
    # The check below asks the same of answers that are not replayed.
    "negative_data_rejection": {"enabled": False},
    # The document allows X-Request-Timeout to be a millionth of a second, which is 504 as it says.
    "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", 504]},
}


@schemathesis.check
def what_the_document_forbids_is_refused(ctx: Any, response: Any, case: Any) -> bool | None:
    """Data that does not fit the document is refused."""
    if "idempotency-replayed" in response.headers:
        # The answer of an earlier, equal request: nothing is done again, and nothing judged.
        return None
    return negative_data_rejection(ctx, response, case)


@dataclass
class Findings:
    """What a run found.

    Attributes:
        cases: Requests that were answered, by phase.
        failures: What failed and how to send it again, each kind once.
        tasks: Names of asyncio tasks that were left behind.
    """

    cases: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)


class Watched:
    """An application, and the loop it was called on."""

    def __init__(
        self, app: Callable[..., Awaitable[None]], is_ready: Callable[[], bool] = lambda: True
    ) -> None:
        self.app = app
        self.is_ready = is_ready
        self.loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.loop = asyncio.get_running_loop()
        await self.app(scope, receive, send)

    def tasks(self) -> Counter[str]:
        """What the tasks on that loop run."""
        assert self.loop is not None

        async def names() -> list[str]:
            return [str(task.get_coro()).partition(" at 0x")[0] for task in asyncio.all_tasks()]

        return Counter(asyncio.run_coroutine_threadsafe(names(), self.loop).result(30))


def application() -> Watched:
    """The service, with everything on that looks at texts."""
    settings = make_settings(
        logging={"level": "ERROR"},
        model={"max_tokens": 8000},
        pii={"input": "redact", "output": "redact"},
    )
    app = create_app(settings, on_fatal=_fatal)
    engine = app.state.services.engine
    return Watched(app, lambda: engine.state is EngineState.READY)


def _fatal(message: str) -> None:
    raise AssertionError(message)


def run(
    cases: int, seed: int, app: Watched | None = None, *, spared: Sequence[str] = ()
) -> Findings:
    """Send about so many cases to the service, at the least the examples and the boundaries.

    Of the paths ``spared`` the boundaries are left out.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    app = app or application()
    found = Findings()
    try:
        schema = schemathesis.openapi.from_asgi(
            "/openapi.json", app, config=_config(cases, seed, spared)
        )
        _wait_for(app.is_ready, START_SECONDS)
        before = app.tasks()
        for event in from_schema(schema).execute():
            _note(event, found)
        # The last answers may still be on their way out.
        _wait_for(lambda: not app.tasks() - before - _MAY_STAY, _SETTLE_SECONDS)
        found.tasks = list((app.tasks() - before - _MAY_STAY).elements())
    finally:
        root.handlers[:], root.level = handlers, level
        shutdown_lifespans()
    return found


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def _config(cases: int, seed: int, spared: Sequence[str]) -> schemathesis.Config:
    return schemathesis.Config.from_dict(
        {
            "seed": seed,
            "continue-on-failure": True,
            "headers": {"X-API-Key": API_KEY},
            "generation": {
                "mode": "all",
                "max-examples": max(1, cases // _OPERATIONS),
                "database": "none",
            },
            # What is written to the report is made up by us.
            "output": {"sanitization": {"enabled": False}},
            "checks": _CHECKS,
            "operations": [
                {"include-path": path, "phases": {"coverage": {"enabled": False}}}
                for path in spared
            ],
        }
    )


def _note(event: Any, found: Findings) -> None:
    if isinstance(event, events.ScenarioFinished):
        found.cases[event.phase.value] += len(event.recorder.interactions)
        for what, how in _failures(event.recorder):
            found.failures.setdefault(f"{event.label}: {what}", how)
    elif isinstance(event, events.NonFatalError):
        found.failures.setdefault(f"{event.label}: {event.value!r}", event.info.format())
    elif isinstance(event, events.FatalError):
        raise event.exception


def _failures(recorder: Any) -> Iterator[tuple[str, str]]:
    for case, checks in recorder.checks.items():
        for check in checks:
            if check.status is not Status.FAILURE:
                continue
            response = recorder.interactions[case].response
            answer = (
                f"{response.status_code} {response.content[:500]!r}" if response else "no answer"
            )
            failure = check.failure_info
            message = re.sub(r"req-\w+|gen-\w+|\d+", "", failure.failure.message)[:200]
            yield f"{check.name}: {message}", f"{failure.code_sample}\n{answer}"
