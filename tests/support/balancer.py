"""A small load balancer, and clients that count lost answers."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import httpx

from tests.support.live import generate
from tests.support.service import Service, open_client
from tests.support.sse import parse

PROBE_SECONDS = 0.1
_REFUSALS = {"draining", "model_loading"}


@dataclass
class _Backend:
    """One instance of the service.

    Attributes:
        client: Keeps its connections open, as balancers do.
        ready: What its last probe, or its last refusal, said.
    """

    client: httpx.AsyncClient
    ready: bool = True


@dataclass
class Balancer:
    """Sends each request to an instance that is ready.

    It repeats a request that an instance has rejected or has accepted no connection for, but not
    one that an instance may have begun.

    Attributes:
        repeated: How often a request was sent elsewhere.
    """

    repeated: int = 0
    _backends: dict[str, _Backend] = field(default_factory=dict)
    _turn: "itertools.count[int]" = field(default_factory=itertools.count)

    def add(self, service: Service) -> None:
        """An instance that is ready."""
        self._backends[service.base_url] = _Backend(open_client(service))

    async def remove(self, service: Service) -> None:
        """An instance that is gone."""
        await self._backends.pop(service.base_url).client.aclose()

    async def probe(self) -> None:
        """Ask every instance whether it is ready, for ever."""
        while True:
            for backend in list(self._backends.values()):
                try:
                    backend.ready = (await backend.client.get("/readyz")).status_code == 200
                except httpx.TransportError:
                    backend.ready = False
            await asyncio.sleep(PROBE_SECONDS)

    async def post(self, body: dict[str, object]) -> httpx.Response:
        """Have a request answered, by another instance if need be; other errors are raised."""
        while True:
            ready = [backend for backend in self._backends.values() if backend.ready]
            if not ready:
                await asyncio.sleep(0.01)
                continue
            backend = ready[next(self._turn) % len(ready)]
            try:
                response = await backend.client.post("/v1/generate", json=body)
            except httpx.ConnectError:
                backend.ready = False
            else:
                if response.status_code != 503 or _code(response) not in _REFUSALS:
                    return response
                backend.ready = False
            self.repeated += 1


def _code(response: httpx.Response) -> str:
    code: str = response.json()["error"]["code"]
    return code


class Sender(Protocol):
    """Where the clients of :func:`load` send their requests."""

    async def post(self, body: dict[str, object]) -> httpx.Response:
        """The answer to a request."""
        ...

    async def probe(self) -> None:
        """Runs beside the clients, until it is cancelled."""
        ...


@asynccontextmanager
async def load(balancer: Sender, clients: int) -> AsyncIterator[Counter[str]]:
    """Clients that send requests without a pause, half of them streams; counts the outcomes."""
    outcomes: Counter[str] = Counter()
    stopping = asyncio.Event()

    async def client(number: int) -> None:
        for i in itertools.count():
            if stopping.is_set():
                return
            prompt = f"client {number}, request {i}: {'x' * (i * 7 % 40)}"
            outcomes[await _outcome(balancer, prompt, stream=bool(i % 2))] += 1

    async with asyncio.TaskGroup() as group:
        probing = group.create_task(balancer.probe())
        running = [group.create_task(client(number)) for number in range(clients)]
        try:
            yield outcomes
        finally:
            stopping.set()
            await asyncio.wait(running)
            probing.cancel()


async def _outcome(balancer: Sender, prompt: str, *, stream: bool) -> str:
    """``whole``, or a description of what was wrong with the answer."""
    try:
        response = await balancer.post(generate(prompt, stream=stream))
    except httpx.TransportError as error:
        return repr(error)
    if response.status_code != 200:
        return f"{response.status_code} {_code(response)}"
    if not stream:
        return "whole" if response.json()["generated_text"] == prompt else "another text"
    streamed = parse(response.text, response.headers)
    if streamed.error is not None:
        return str(streamed.error["code"])
    return "whole" if streamed.done and streamed.text == prompt else "a stream that broke off"
