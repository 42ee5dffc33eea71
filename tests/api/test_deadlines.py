"""X-Request-Timeout, the timeout in the queue, and fair turns between callers, over HTTP."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.contract.test_openapi import document
from tests.support.application import KEY, OTHER, Client, start
from tests.support.sse import parse

# An answer that takes a minute and a half.
SLOW = {"engine": {"echo_step_seconds": 0.02}, "security": {"max_prompt_chars": 5000}}
LONG = {"prompt": "x" * 4500, "max_tokens": 500}

# These tests share applications, which live on one event loop.
shared = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain() -> AsyncIterator[Client]:
    """An application with the default limits."""
    async with start() as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def slow() -> AsyncIterator[Client]:
    """An application whose tokens take time."""
    async with start(**SLOW) as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def single() -> AsyncIterator[Client]:
    """A slow application that answers one request at a time, and lets others wait for 3 s."""
    # A stream begins before that, also on a busy machine.
    engine = {"echo_step_seconds": 0.02, "max_running": 1, "queue_timeout_seconds": 3}
    async with start(**{**SLOW, "engine": engine}) as client:
        yield client


async def post(
    client: Client, body: dict[str, Any], limit: str | None = None, **fields: Any
) -> httpx.Response:
    """POST /v1/generate, with a limit as X-Request-Timeout."""
    headers = {"X-API-Key": fields.pop("key", KEY)}
    if limit is not None:
        headers["X-Request-Timeout"] = limit
    return await client.http.post("/v1/generate", json={**body, **fields}, headers=headers)


def code(response: httpx.Response) -> tuple[int, str]:
    """Status and code of an error."""
    return response.status_code, response.json()["error"]["code"]


async def idle(client: Client) -> None:
    """Wait until no request is left, here and in the engine process."""
    engine = client.services.engine
    async with asyncio.timeout(10):
        while not engine.queue.is_empty or engine.stats.running:  # noqa: ASYNC110 - polls another process
            await asyncio.sleep(0.01)


async def gauge_is(client: Client, name: str, value: int) -> None:
    """Wait until a metric has a value."""
    registry = client.services.metrics.registry
    async with asyncio.timeout(10):
        while registry.get_sample_value(name) != value:  # noqa: ASYNC110 - polls another process
            await asyncio.sleep(0.01)


@contextmanager
def stuck(client: Client, method: str) -> Iterator[None]:
    """A tokenizer that does not return from ``method`` before the context ends."""
    tokenizer = client.services.engine.tokenizer
    free = threading.Event()
    original = getattr(tokenizer, method)

    def wait(*arguments: Any) -> Any:
        free.wait(60)
        return original(*arguments)

    setattr(tokenizer, method, wait)
    try:
        yield
    finally:
        free.set()
        delattr(tokenizer, method)


@shared
@pytest.mark.parametrize("cache", [True, False])
async def test_a_running_request_ends_at_its_callers_limit(slow: Client, cache: bool) -> None:
    """The request gets 504 and stops running, whether or not its generation may be shared."""
    response = await post(slow, LONG, "0.3", cache=cache)
    assert code(response) == (504, "deadline_exceeded")
    await idle(slow)


@shared
async def test_a_waiting_request_ends_at_its_callers_limit(single: Client) -> None:
    """The waiting request gets 504, and the running one goes on."""
    running = asyncio.create_task(post(single, LONG, cache=False))
    await gauge_is(single, "llm_requests_running", 1)
    response = await post(single, LONG, "0.2", cache=False)
    assert code(response) == (504, "deadline_exceeded")
    await gauge_is(single, "llm_requests_running", 1)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await idle(single)


@shared
async def test_a_stream_says_that_its_time_is_over(slow: Client) -> None:
    """The headers have been sent, so the error is the last event."""
    response = await post(slow, LONG, "0.5", stream=True)
    assert response.status_code == 200
    streamed = parse(response.text, response.headers)
    assert streamed.done
    assert streamed.events[-1]["error"]["code"] == "deadline_exceeded"
    assert "".join(streamed.pieces).startswith("x")
    await idle(slow)


async def test_the_services_own_limit_holds_where_it_is_shorter() -> None:
    """A caller cannot ask for more time than the configuration gives."""
    engine = {"echo_step_seconds": 0.02, "request_timeout_seconds": 0.3}
    async with start(**{**SLOW, "engine": engine}) as client:
        response = await post(client, LONG, "100")
        assert code(response) == (504, "deadline_exceeded")
        await idle(client)


@shared
@pytest.mark.parametrize("cache", [True, False])
async def test_encoding_the_prompt_is_part_of_the_time(plain: Client, cache: bool) -> None:
    """A tokenizer that does not return in time holds up neither the caller nor its place."""
    body = {"prompt": f"not kept, {cache}"}
    with stuck(plain, "encode_text"):
        response = await post(plain, body, "0.2", cache=cache)
        assert code(response) == (504, "deadline_exceeded")
        await idle(plain)
    assert (await post(plain, body, "30")).status_code == 200


async def test_the_services_own_limits_count_while_the_prompt_is_encoded() -> None:
    """A request whose prompt is not encoded in time gets 503, as one that has waited too long."""
    async with start(engine={"queue_timeout_seconds": 0.2}) as client:
        with stuck(client, "render_chat"):
            response = await client.say("hello", session=None)
            assert code(response) == (503, "overloaded")
            await idle(client)


@shared
async def test_counting_a_sessions_history_is_part_of_the_time(plain: Client) -> None:
    """The turn is abandoned, and the session stays usable."""
    await plain.say("one")
    with stuck(plain, "chat_prompt"):
        response = await plain.http.post(
            "/v1/chat",
            json={"messages": [{"role": "user", "content": "two"}], "session_id": "s"},
            headers={"X-Request-Timeout": "0.2"},
        )
        assert code(response) == (504, "deadline_exceeded")
    assert (await plain.say("three")).status_code == 200
    assert [content for role, content in await plain.history() or [] if role == "user"] == [
        "one",
        "three",
    ]


@shared
async def test_readers_of_one_generation_have_each_their_own_time(slow: Client) -> None:
    """Of two readers the one with little time gets 504, and the other one the whole answer."""
    body = {"prompt": "y" * 80, "max_tokens": 100}
    first, second = await asyncio.gather(post(slow, body, "0.4"), post(slow, body, "60"))
    assert code(first) == (504, "deadline_exceeded")
    assert second.json()["generated_text"] == "y" * 80
    metrics = (await slow.http.get("/metrics")).text
    assert 'response_cache_requests_total{result="coalesced"} 1.0' in metrics
    # A cached answer takes no time.
    assert (await post(slow, body, "0.001")).json()["cached"] is True


@shared
@pytest.mark.parametrize("given", ["30", "2.5", "00.50", "000000300", "999999999999"])
async def test_a_positive_decimal_number_is_taken(plain: Client, given: str) -> None:
    """Leading zeros and values above the configured limit are accepted."""
    assert (await post(plain, {"prompt": "hello"}, given, cache=False)).status_code == 200


BAD = [
    "0",
    "0.0",
    "-1",
    "+1",
    "",
    "abc",
    "1e3",
    "inf",
    "nan",
    "1_0",
    "5s",
    "1,5",
    "0x5",
    ".5",
    "5.",
]


@shared
async def test_anything_else_is_rejected_by_the_headers_name(plain: Client) -> None:
    """Routes that generate answer 422 before any work, and do not repeat the value."""
    value = plain.services.metrics.registry.get_sample_value
    before = value("llm_prompt_tokens_total")
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    bodies: dict[str, Any] = {"/v1/generate": {"prompt": "hello"}, "/v1/chat": chat}
    for given in [*(text.encode() for text in [*BAD, "9" * 400, "٣"]), b"\xff"]:
        for path, body in bodies.items():
            headers = [(b"X-Request-Timeout", given)]
            response = await plain.http.post(path, json={**body, "cache": False}, headers=headers)
            assert code(response) == (422, "validation_error"), given
            assert response.json()["error"]["param"] == "X-Request-Timeout"
    assert value("llm_prompt_tokens_total") == before


def test_every_route_that_generates_declares_the_header() -> None:
    """The OpenAPI document declares it, as a positive number, on each route that can answer 504."""
    declared = 0
    for path, methods in document()["paths"].items():
        for operation in methods.values():
            if "504" not in operation["responses"]:
                continue
            header = next(p for p in operation["parameters"] if p["name"] == "X-Request-Timeout")
            assert (header["in"], header["required"]) == ("header", False), path
            pattern = header["schema"]["pattern"]
            assert not any(re.search(pattern, bad) for bad in BAD), path
            assert all(re.search(pattern, good) for good in ("1", "0.5", "007.50", "9" * 12)), path
            declared += 1
    assert declared >= 2


@shared
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_waits_too_long_is_told_when_to_come_back(
    single: Client, stream: bool
) -> None:
    """The request gets 503 with Retry-After, or an event if its stream has begun."""
    running = asyncio.create_task(post(single, LONG, cache=False))
    await gauge_is(single, "llm_requests_running", 1)
    response = await post(single, {"prompt": "hello"}, cache=False, stream=stream)
    if stream:
        assert response.status_code == 200
        last = parse(response.text, response.headers).events[-1]
        assert last["error"]["code"] == "overloaded"
    else:
        assert code(response) == (503, "overloaded")
        assert 1 <= int(response.headers["Retry-After"]) <= 60
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await idle(single)


async def test_one_key_does_not_starve_another() -> None:
    """A key that floods the service leaves the last places to others, which are served next."""
    order: list[tuple[str, int]] = []
    engine = {"echo_step_seconds": 0.01, "max_running": 1, "max_waiting": 16}
    async with start(engine=engine) as client:

        async def one(key: str, number: int) -> None:
            response = await post(client, {"prompt": f"{number:09}"}, key=key, cache=False)
            order.append((key, response.status_code))

        # 15 = one that runs and 14 of 16 that wait; the rest is rejected.
        flood = [asyncio.create_task(one(KEY, n)) for n in range(20)]
        async with asyncio.timeout(10):
            while len(order) < 5:  # noqa: ASYNC110 - other tasks
                await asyncio.sleep(0.001)
        await one(OTHER, 100)
        await asyncio.gather(*flood)
        assert order[:5] == [(KEY, 503)] * 5
        served = [key for key, status in order if status == 200]
        assert served == [KEY, OTHER, *[KEY] * 14]
