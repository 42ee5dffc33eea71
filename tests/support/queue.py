"""A request queue without an engine: the test says when requests end, and what time it is."""

import asyncio
from typing import Any

from app.core.config_engine import EngineSettings
from app.core.metrics import Metrics
from app.llm.engine.admission import Admission, RequestQueue
from app.llm.engine.base import GenerationRequest, SamplingParams, TokenEvent


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


class ManualEngine:
    """A request queue, and the engine behind it.

    Attributes:
        queue: The queue.
        clock: What it measures with.
        running: Admissions of the submitted requests that have not ended, by request id.
        order: Request ids in the order in which they were submitted.
        tasks: Every request that was admitted, by its id.
    """

    def __init__(self, **limits: Any) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.queue = RequestQueue(EngineSettings(**limits), self.metrics, "manual", self.clock)
        self.running: dict[str, Admission] = {}
        self.order: list[str] = []
        self.tasks: dict[str, asyncio.Task[list[TokenEvent]]] = {}
        self.admissions: dict[str, Admission] = {}

    def submit(self, request: GenerationRequest, admission: Admission) -> None:
        """A request has got its turn."""
        assert request.id not in self.order, "submitted twice"
        self.order.append(request.id)
        self.running[request.id] = admission

    def cancel(self, request_id: str) -> None:
        """A request is to be stopped; only one that runs may be."""
        del self.running[request_id]

    async def ask(self, caller: str) -> str:
        """Admit a request and let it wait for its turn; its id begins with its caller's name.

        Raises:
            OverloadedError: There is no place.
        """
        admission = self.queue.admit(self, caller)
        request = GenerationRequest(f"{caller}-{len(self.tasks)}", [1], 1, SamplingParams())

        async def collect() -> list[TokenEvent]:
            return [event async for event in admission.generate(request)]

        self.tasks[request.id] = asyncio.create_task(collect())
        self.admissions[request.id] = admission
        await self.settle()
        return request.id

    async def end(self, request_id: str) -> None:
        """A running request gets its last token."""
        admission = self.running.pop(request_id)
        admission.deliver(TokenEvent(request_id, [2], finish_reason="stop"))
        await self.settle()

    async def leave(self, request_id: str) -> None:
        """The caller of a request leaves."""
        self.tasks[request_id].cancel()
        await self.settle()

    async def settle(self) -> None:
        """Let everything happen that can."""
        for _ in range(6):
            await asyncio.sleep(0)

    @property
    def live(self) -> list[str]:
        """Requests that have not ended, in the order of their admission."""
        return [name for name, task in self.tasks.items() if not task.done()]

    def is_empty(self) -> bool:
        """Whether nothing is left of all requests."""
        queue = self.queue
        return not (
            queue._admissions
            or queue._ended
            or not queue._slots.is_empty
            or queue._turns._callers
            or queue._turns._order
            or queue._slots.departures._started
            or self.running
        )
