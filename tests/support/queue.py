"""A request queue without an engine process: the test says when requests end."""

import asyncio
from typing import Any

from app.core.config.engine import EngineSettings
from app.core.metrics import Metrics
from app.llm.client.admission import RequestQueue
from app.llm.client.place import Place
from app.llm.protocol import GenerationRequest, SamplingParams, TokenEvent
from app.utils.errors import ServiceError


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


async def read(place: Place, request: GenerationRequest) -> list[TokenEvent]:
    """Start a request, read all of its events, and release its place.

    Raises:
        ServiceError: It failed.
    """
    try:
        place.start(request)
        events: list[TokenEvent] = []
        while not events or events[-1].finish_reason is None:
            events += await place.events()
        return events
    finally:
        place.release()


class ManualEngine:
    """A request queue, and an engine that gives slots in the order of submission.

    Attributes:
        queue: The queue.
        metrics: Where it measures.
        running: Requests that have a slot, oldest first.
        ahead: Submitted requests that have none yet, oldest first.
        order: Request ids in the order in which they were submitted.
        tasks: The reader of every admitted request, by the request's id.
        places: Every request's place.
    """

    def __init__(self, **limits: Any) -> None:
        self.metrics = Metrics()
        self.settings = EngineSettings(**limits)
        self.queue = RequestQueue(self.settings, self.metrics, "manual")
        self.running: list[str] = []
        self.ahead: list[str] = []
        self.order: list[str] = []
        self.tasks: dict[str, asyncio.Task[list[TokenEvent]]] = {}
        self.places: dict[str, Place] = {}

    def submit(self, request: GenerationRequest, place: Place) -> None:
        """A request is for the engine."""
        assert request.id not in self.order, "submitted twice"
        self.order.append(request.id)
        self.places[request.id] = place
        self.ahead.append(request.id)

    def cancel(self, request_id: str) -> None:
        """A request is to be stopped."""
        for requests in (self.running, self.ahead):
            if request_id in requests:
                requests.remove(request_id)

    async def ask(self, caller: str) -> str:
        """Admit a request and start it; its id begins with its caller's name.

        Raises:
            OverloadedError: There is no place.
        """
        place = self.queue.admit(self, caller)
        request = GenerationRequest(f"{caller}-{len(self.tasks)}", [1], 1, SamplingParams())
        self.tasks[request.id] = task = asyncio.create_task(read(place, request))
        # A test may not ask how it ended; asyncio would log that, whenever garbage is collected.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        self.places[request.id] = place
        await self.settle()
        return request.id

    def deliver(self, request_id: str, *, last: bool = True) -> None:
        """A running request gets a token."""
        if last:
            self.running.remove(request_id)
        event = TokenEvent(request_id, [2], finish_reason="stop" if last else None)
        self.places[request_id].deliver(event)

    async def end(self, request_id: str) -> None:
        """A running request gets its last token."""
        self.deliver(request_id)
        await self.settle()

    async def leave(self, request_id: str) -> None:
        """The caller of a request leaves."""
        self.tasks[request_id].cancel()
        await self.settle()

    async def fail(self, request_id: str, error: ServiceError) -> None:
        """A request fails."""
        self.places[request_id].fail(error)
        await self.settle()

    async def settle(self) -> None:
        """Let everything happen that can, and fill the slots that are free."""
        for _ in range(6):
            await asyncio.sleep(0)
            while self.ahead and len(self.running) < self.settings.max_running:
                self.running.append(self.ahead.pop(0))
                self.places[self.running[-1]].slot_taken()
            self.queue.running = len(self.running)

    @property
    def live(self) -> list[str]:
        """Requests that have not ended, in the order of their admission."""
        return [name for name, task in self.tasks.items() if not task.done()]

    def value(self, name: str, **labels: str) -> float:
        """A metric's value; 0 for a series that has no sample yet."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def is_empty(self) -> bool:
        """Whether nothing is left of all requests."""
        now = self.queue.snapshot()
        left = (now.running, now.waiting, *self.running, *self.ahead)
        return self.queue.is_empty and not any(left)
