"""Sending the requests of a round: in a closed loop, or in an open one."""

import asyncio
import time
from collections.abc import Sequence
from itertools import chain

from app.bench.results import Result, result_of
from app.bench.targets import Target
from app.bench.transport import Exchange, HttpClient
from app.bench.workload import PlannedRequest, Workload


async def closed_loop(
    http: HttpClient, target: Target, requests: Sequence[PlannedRequest], *, clients: int
) -> list[Exchange]:
    """So many clients, each of which sends its next request when its last one has ended."""
    bodies = iter([target.body(request) for request in requests])

    async def client() -> list[Exchange]:
        return [await http.post(target.path, body, target.headers) for body in bodies]

    done = await asyncio.gather(*(client() for _ in range(clients)))
    return list(chain.from_iterable(done))


async def open_loop(
    http: HttpClient, target: Target, requests: Sequence[PlannedRequest]
) -> list[Exchange]:
    """Each request at its planned time, however many are still unanswered."""
    bodies = [target.body(request) for request in requests]
    start = time.perf_counter()

    async def send(at: float, body: bytes) -> Exchange:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        return await http.post(target.path, body, target.headers, start + at)

    sent = (send(r.at, body) for r, body in zip(requests, bodies, strict=True))
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
    """One round, with connections of its own.

    Args:
        target: Whom to ask.
        workload: What to ask for.
        name: Rounds of different names send different prompts.
        requests: How many.
        clients: Of a closed loop.
        rate: Requests a second of an open loop; one of the two is given.
        time_limit: Seconds after which a request counts as failed.

    Returns:
        One result for each request.

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
