"""The load generator against the service, and against servers with faults."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load.__main__ import main
from benchmarks.load.results import Outcome, Result, summarise
from benchmarks.load.rounds import run_round
from benchmarks.load.targets import Route, Target
from benchmarks.load.workload import Lengths, Workload
from tests.support.service import API_KEY, Service, running_service

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
PIECE = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
LAST = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Target]:
    """Run a server that calls ``handler`` for every connection."""
    tasks: set[asyncio.Task[None] | None] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            await handler(reader, writer)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield Target(f"http://127.0.0.1:{port}", Route.OPENAI_CHAT)
        await asyncio.wait([task for task in tasks if task])


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """Read a request; its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return await reader.readexactly(length)


def target_of(service: Service, route: Route = Route.CHAT) -> Target:
    """The target of a running service."""
    return Target(service.base_url, route, API_KEY)


def outcomes(results: list[Result]) -> list[Outcome]:
    """The outcomes of a round's requests."""
    return [result.outcome for result in results]


@pytest.mark.parametrize("route", [Route.CHAT, Route.GENERATE])
async def test_a_closed_loop_completes_every_request(echo_service: Service, route: Route) -> None:
    """Each request of a closed loop is answered once, with its text and number of tokens."""
    results = await run_round(
        target_of(echo_service, route), Workload(), name="a", requests=24, clients=6
    )
    assert outcomes(results) == [Outcome.COMPLETED] * 24
    assert {result.tokens for result in results} == {32}
    assert all(result.tokens_reported and result.ttft is not None for result in results)
    planned = {r.prompt[:32] for r in Workload().plan(24, round_name="a")}
    assert {result.text for result in results} == planned


async def test_a_closed_loop_has_one_request_a_client() -> None:
    """Three clients have exactly three requests open at a time."""
    three = asyncio.Barrier(3)
    running = most = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal running, most
        await read_request(reader)
        running += 1
        most = max(most, running)
        # No request is answered before three are open.
        await three.wait()
        running -= 1
        writer.write(HEAD + b"\r\n" + PIECE + LAST)
        await writer.drain()

    async with serving(answer) as target, asyncio.timeout(20):
        results = await run_round(target, Workload(), name="a", requests=12, clients=3)
    assert outcomes(results) == [Outcome.COMPLETED] * 12
    assert most == 3


async def test_an_open_loop_does_not_wait_for_answers(slow_service: Service) -> None:
    """Requests are sent at their planned times while earlier ones run."""
    workload = Workload(output_tokens=Lengths((40,)))
    results = await run_round(
        target_of(slow_service), workload, name="open", requests=10, rate=20.0
    )
    assert outcomes(results) == [Outcome.COMPLETED] * 10
    planned = [request.at for request in workload.plan(10, round_name="open", rate=20.0)]
    start = results[0].sent_at - planned[0]
    assert [r.sent_at - start for r in results] == pytest.approx(planned, abs=0.5)
    # 40 tokens take 2 s, so all requests were sent before the first one ended.
    assert max(r.sent_at for r in results) < min(r.ended_at for r in results)


async def test_rejections_of_a_full_queue_are_counted() -> None:
    """With one slot and one place, all other requests count as rejected."""
    with running_service(
        ENGINE__ECHO_STEP_SECONDS="0.02", ENGINE__MAX_RUNNING="1", ENGINE__MAX_WAITING="1"
    ) as service:
        results = await run_round(
            target_of(service), Workload(), name="full", requests=12, clients=12
        )
    found = summarise(results)
    assert [found[name] for name in ("sent", "completed", "refused", "failed")] == [12, 2, 10, 0]
    assert found["errors"] == {"overloaded": 10}
    refusal, latency = found["refusal"]["p99"], found["latency"]["p50"]
    assert refusal is not None
    assert latency is not None
    assert refusal < latency


async def test_a_server_that_dies_in_mid_stream_is_an_error() -> None:
    """A request whose connection is lost in the stream has failed."""

    async def die(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(PIECE), PIECE))
        await writer.drain()

    async with serving(die) as target, asyncio.timeout(20):
        results = await run_round(target, Workload(), name="a", requests=6, clients=2)
    assert [(r.outcome, r.error) for r in results] == [
        (Outcome.FAILED, "the connection was lost")
    ] * 6


async def test_a_silent_server_runs_into_the_time_limit() -> None:
    """A request without an answer fails after its timeout."""

    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(silence) as target, asyncio.timeout(20):
        results = await run_round(
            target, Workload(), name="a", requests=2, clients=2, time_limit=0.2
        )
    assert [r.error for r in results] == ["no end of the response within 0.2 s"] * 2


async def test_a_kept_connection_that_was_closed_costs_no_request() -> None:
    """A request on a connection that the server had closed is sent again, and counted as resent."""
    bodies = []

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        bodies.append(json.loads(await read_request(reader)))
        body = PIECE + LAST
        writer.write(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        # The next request arrives, is not read, and the connection is closed.
        await reader.read(1)

    async with serving(answer_once) as target, asyncio.timeout(20):
        results = await run_round(target, Workload(), name="a", requests=4, clients=1)
    found = summarise(results)
    assert (found["completed"], found["resent"]) == (4, 3)
    assert len({body["messages"][0]["content"] for body in bodies}) == 4


async def test_a_body_may_end_with_its_connection() -> None:
    """A response without a length is complete when the server closes the connection."""

    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + b"\r\n" + PIECE + LAST)
        await writer.drain()

    async with serving(close) as target, asyncio.timeout(20):
        results = await run_round(target, Workload(), name="a", requests=2, clients=1)
    assert [(r.outcome, r.text) for r in results] == [(Outcome.COMPLETED, "a")] * 2


def test_the_report_of_a_run_holds_every_round(echo_service: Service, tmp_path: Path) -> None:
    """The JSON file has the figures of every round and their medians, and not the key."""
    file = tmp_path / "out.json"
    words = ["--url", echo_service.base_url, "--key", API_KEY, "--clients", "4"]
    assert main([*words, "--rounds", "2", "--max-ttft", "60", "--json", str(file)]) == 0
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert [r["completed"] for r in report["rounds"]] == [16, 16]
    assert report["medians"]["good_share"] == 1.0
    assert API_KEY not in file.read_text(encoding="utf-8")
