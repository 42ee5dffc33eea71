"""Sends the requests of a round in a closed loop or an open loop."""

import asyncio
import sys
import time
from collections.abc import Sequence
from itertools import chain

from benchmarks.load.results import Result, result_of
from benchmarks.load.targets import Target
from benchmarks.load.transport import Exchange, HttpClient
from benchmarks.load.workload import PlannedRequest, Workload

# uvloop takes a third of asyncio's time for an event, but does not run on Windows.
if sys.platform == "win32":
    run = asyncio.run
else:
    import uvloop

    run = uvloop.run


async def closed_loop(
    http: HttpClient, target: Target, requests: Sequence[PlannedRequest], *, clients: int
) -> list[Exchange]:
    """``clients`` clients, each of which sends its next request when its last one has ended."""
    bodies = iter([target.body(request) for request in requests])

    async def client() -> list[Exchange]:
        return [await http.post(target.path, body, target.headers) for body in bodies]

    done = await asyncio.gather(*(client() for _ in range(clients)))
    return list(chain.from_iterable(done))


async def open_loop(
    http: HttpClient, target: Target, requests: Sequence[PlannedRequest]
) -> list[Exchange]:
    """Send each request at its planned time, without waiting for earlier answers."""
    bodies = [target.body(request) for request in requests]
    sent: list[asyncio.Task[Exchange]] = []
    start = time.perf_counter()
    for request, body in zip(requests, bodies, strict=True):
        at = start + request.at
        # One sleep for the next request: tens of thousands of timers would cost more.
        if (early := at - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        sent.append(asyncio.create_task(http.post(target.path, body, target.headers, at)))
    return list(await asyncio.gather(*sent))


async def run_round(
    target: Target,
    workload: Workload,
    *,
    name: str,
    requests: int,
    clients: int | None = None,
    rate: float | None = None,
    time_limit: float = 300.0,
) -> list[Result]:
    """Run a round over new connections.

    Args:
        target: The server and its route.
        workload: The description of the requests.
        name: Rounds of different names have different prompts.
        requests: Number of requests.
        clients: Clients of a closed loop.
        rate: Requests a second of an open loop. Exactly one of the two is given.
        time_limit: Timeout of a request in seconds.

    Raises:
        ValueError: The workload cannot be planned, or both or none of clients and rate are given.
    """
    if (clients is None) == (rate is None):
        raise ValueError("a round has either clients (closed loop) or a rate (open loop)")
    planned = workload.plan(requests, round_name=name, rate=rate)
    http = HttpClient(target.base_url, time_limit=time_limit)
    try:
        if clients is not None:
            exchanges = await closed_loop(http, target, planned, clients=clients)
        else:
            exchanges = await open_loop(http, target, planned)
    finally:
        http.close()
    return [result_of(exchange) for exchange in exchanges]
