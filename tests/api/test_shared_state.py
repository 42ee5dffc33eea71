"""Two applications and a real Redis behave as one service, and each alone without Redis."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio

from app.core.logging import get_logger
from tests.support.application import KEY, OTHER, Client, start
from tests.support.redis_server import RedisServer, redis_server

pytestmark = pytest.mark.asyncio(loop_scope="module")

BURST = 60
IDEMPOTENT = {"Idempotency-Key": "k"}


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """A Redis for the tests of this file."""
    with redis_server() as server:
        yield server


@asynccontextmanager
async def replica(redis: RedisServer, **sections: Any) -> AsyncIterator[Client]:
    """An application that shares its state; ``sections`` are further settings."""
    values: dict[str, dict[str, Any]] = {
        # A test machine may stop for longer than the default time-out.
        "state": {
            "backend": "redis",
            "url": redis.url,
            "timeout_seconds": 20,
        },
        "engine": {"echo_step_seconds": 0.003},
        "security": {"api_keys": [{"name": "bob", "key": OTHER, "daily_tokens": 10}]},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    async with start(**values) as client:
        yield client


Pair = tuple[Client, Client]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(redis: RedisServer) -> AsyncIterator[Pair]:
    """Two replicas."""
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(replica(redis))
        two = await stack.enter_async_context(replica(redis))
        yield one, two


def value(client: Client, name: str, **labels: str) -> float:
    """A metric's sample."""
    return client.services.metrics.registry.get_sample_value(name, labels) or 0.0


async def until(condition: Any) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110 - another replica
            await asyncio.sleep(0.01)


async def ask(client: Client, **body: Any) -> Any:
    """A response of /v1/responses."""
    return await client.http.post("/v1/responses", json={"model": "echo", **body})


async def test_a_sessions_turns_may_go_to_any_replica(pair: Pair) -> None:
    """Turns that alternate between two replicas make one history, which both show and delete."""
    said = []
    for number in range(6):
        text = f"turn {number}"
        assert (await pair[number % 2].say(text)).status_code == 200
        said += [("user", text), ("assistant", text)]
    assert await pair[0].history() == await pair[1].history() == said
    assert (await pair[1].http.delete("/v1/sessions/s")).status_code == 204
    assert await pair[0].history() is None
    assert (await pair[0].http.delete("/v1/sessions/s")).status_code == 404


async def test_of_two_turns_at_once_one_is_refused(pair: Pair) -> None:
    """Of two turns of one session on two replicas one is 409, and the other is kept."""
    answers = await asyncio.gather(*(client.say("x" * 100, "both") for client in pair))
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    assert len(await pair[0].history("both") or []) == 2


async def test_a_session_deleted_elsewhere_during_a_turn_stays_deleted(pair: Pair) -> None:
    """A turn that runs during DELETE on another replica is answered and not kept."""
    turn = asyncio.create_task(pair[0].say("x" * 300, "gone"))
    await pair[0].until_running()
    assert (await pair[1].http.delete("/v1/sessions/gone")).status_code == 204
    assert (await turn).status_code == 200
    assert await pair[1].history("gone") is None


async def test_responses_are_continued_on_the_other_replica(pair: Pair) -> None:
    """previous_response_id, conversation and item references work on either replica."""
    first = (await ask(pair[0], input="one")).json()
    second = (await ask(pair[1], input="two", previous_response_id=first["id"])).json()
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    shown = await pair[0].http.get(f"/v1/responses/{second['id']}")
    assert shown.json()["output"] == second["output"]
    referred = {"type": "item_reference", "id": first["output"][0]["id"]}
    asked = {"role": "user", "content": "and?"}
    assert (await ask(pair[1], input=[referred, asked])).status_code == 200
    for number, client in enumerate(pair):
        assert (await ask(client, input=f"{number}", conversation="conv")).status_code == 200
    assert len(await pair[0].history("conv") or []) == 4
    assert (await pair[1].http.delete(f"/v1/responses/{first['id']}")).status_code == 200
    assert (await ask(pair[0], input="x", previous_response_id=first["id"])).status_code == 404


async def test_a_key_is_replayed_by_the_other_replica(pair: Pair) -> None:
    """A request that is repeated on the other replica gets the same bytes; another one 422."""
    body = {"messages": [{"role": "user", "content": "once"}], "cache": False}
    first = await pair[0].http.post("/v1/chat", json=body, headers=IDEMPOTENT)
    again = await pair[1].http.post("/v1/chat", json=body, headers=IDEMPOTENT)
    assert again.content == first.content
    assert again.headers["Idempotency-Replayed"] == "true"
    other = await pair[1].http.post("/v1/chat", json={**body, "cache": True}, headers=IDEMPOTENT)
    assert other.json()["error"]["code"] == "idempotency_key_reused"


async def test_a_key_in_use_is_in_use_everywhere(pair: Pair) -> None:
    """A request under way on one replica is 409 on the other, and free once it has failed."""
    headers = {"Idempotency-Key": "running"}
    body = {"messages": [{"role": "user", "content": "x" * 300}], "cache": False}
    first = asyncio.create_task(pair[0].http.post("/v1/chat", json=body, headers=headers))
    await pair[0].until_running()
    second = await pair[1].http.post("/v1/chat", json=body, headers=headers)
    assert second.json()["error"]["code"] == "idempotency_key_in_use"
    assert (await first).status_code == 200
    fault = {"messages": [{"role": "user", "content": "[echo:fault]"}]}
    for client in pair:
        failed = await client.http.post("/v1/chat", json=fault, headers={"Idempotency-Key": "f"})
        assert failed.status_code == 500


async def test_an_answer_is_kept_for_both(pair: Pair) -> None:
    """A request that one replica has answered is answered from the cache by the other."""
    answer = await pair[0].say("a cached answer", session=None)

    async def is_cached() -> bool:
        return bool((await pair[1].say("a cached answer", session=None)).json()["cached"])

    assert not answer.json()["cached"]
    await until(is_cached)


async def test_usage_is_the_same_on_both(pair: Pair) -> None:
    """Both replicas show the sum of what both have counted, since the same time."""
    # A replica shows, and first sends, what it has counted itself.
    shown = [(await client.http.get("/v1/usage")).json() for client in pair]
    before = shown[1]["keys"][0]["total"]["requests"]
    for client in pair * 2:
        await client.say("counted", session=None, cache=False)

    async def is_equal() -> bool:
        shown = [(await client.http.get("/v1/usage")).json() for client in pair]
        for usage in shown:
            del usage["seconds_left"]
        return bool(shown[0] == shown[1] and shown[0]["keys"][0]["total"]["requests"] == before + 4)

    await until(is_equal)


async def test_a_burst_is_one_for_all_replicas(redis: RedisServer) -> None:
    """Of 120 requests to two replicas the burst passes, and what was refilled meanwhile."""
    limits = {"enabled": True, "requests_per_minute": 60, "burst_size": BURST}
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                replica(redis, rate_limit=limits, state={"prefix": "burst"})
            )
            for _ in range(2)
        ]
        began = time.monotonic()
        answers = await asyncio.gather(
            *(clients[i % 2].http.get("/v1/sessions/none") for i in range(120))
        )
        passed = [a for a in answers if a.status_code == 404]
        assert BURST <= len(passed) <= BURST + 1 + (time.monotonic() - began)
        assert {a.status_code for a in answers} == {404, 429}
        assert all(int(a.headers["x-ratelimit-limit"]) == BURST for a in answers)


async def test_usage_and_budgets_survive_a_restart(redis: RedisServer, pair: Pair) -> None:
    """A new replica refuses a caller whose budget earlier ones have seen spent."""
    assert (await pair[0].say("spend it all", None, key=OTHER)).status_code == 200
    used = (await pair[0].http.get("/v1/usage")).json()
    async with replica(redis) as client:
        refused = await client.say("more", None, key=OTHER)
        assert refused.json()["error"]["code"] == "token_budget_exceeded"
        again = (await client.http.get("/v1/usage")).json()
        assert (again["keys"][1], again["since"]) == (used["keys"][1], used["since"])


async def check_alone(client: Client) -> None:
    """Assert what a replica does without Redis."""
    began = time.process_time()
    for _ in range(3):
        plain = await client.say("hello", session=None)
        assert plain.status_code == 200
        assert not plain.json()["cached"]
    refusals = [
        await client.say("hello"),
        await client.http.get("/v1/sessions/s"),
        await client.http.delete("/v1/sessions/s"),
        await ask(client, input="x", conversation="c"),
        await client.http.post(
            "/v1/generate", json={"prompt": "x"}, headers={"Idempotency-Key": "alone"}
        ),
    ]
    for refused in refusals:
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "state_unavailable"
        assert refused.headers["Retry-After"] == "1"
    assert (await client.http.get("/readyz")).status_code == 200
    assert (await client.http.get("/v1/usage")).status_code == 200
    assert time.process_time() - began < 5
    assert value(client, "llm_shared_state_up", backend="redis") == 0
    for part in ("limits", "answers", "sessions", "idempotency", "usage"):
        assert value(client, "llm_shared_state_failures_total", part=part) > 0


Requests = list[asyncio.Task[httpx.Response]]


async def begin_requests(client: Client) -> Requests:
    """Turns, a streamed one too, and a request with an idempotency key, which take a second."""
    message = {"messages": [{"role": "user", "content": "x" * 300}], "cache": False}
    requests = (
        client.say("x" * 300, "whole", cache=False),
        client.say("x" * 300, "streamed", stream=True, cache=False),
        client.http.post("/v1/chat", json=message, headers={"Idempotency-Key": "under way"}),
    )
    tasks = [asyncio.create_task(request) for request in requests]

    async def all_run() -> bool:
        return client.services.engine.queue.snapshot().running == len(tasks)

    await until(all_run)
    return tasks


async def check_ended(tasks: Requests) -> None:
    """Assert what becomes of :func:`begin_requests` where Redis is away at their end."""
    whole, streamed, once = await asyncio.gather(*tasks)
    # A history without the turn would be wrong, and the caller has to know.
    assert whole.json()["error"]["code"] == "state_unavailable"
    assert '"code":"state_unavailable"' in streamed.text
    assert once.status_code == 200


async def check_together(client: Client) -> None:
    """Assert that a replica finds its way back."""

    async def is_up() -> bool:
        return value(client, "llm_shared_state_up", backend="redis") == 1

    await until(is_up)
    assert (await client.say("again", session="later")).status_code == 200


@pytest.mark.parametrize("fault", ["stopped", "gone"])
async def test_without_redis_a_replica_goes_on_alone(
    fault: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis hung or gone: limits are the replica's own, sessions 503, chats go on; it heals."""
    limits = {"enabled": True, "requests_per_minute": 60, "burst_size": 13}
    with redis_server() as server:
        sections = {"logging": {"level": "WARNING"}, "state": {"timeout_seconds": 0.25}}
        async with replica(server, rate_limit=limits, **sections) as client:
            monkeypatch.setattr(get_logger("state"), "handlers", [caplog.handler])
            assert (await client.say("first", session="before")).status_code == 200
            begun = await begin_requests(client)
            with server.stopped() if fault == "stopped" else server.gone():
                await check_alone(client)
                answers = [await client.http.get("/v1/usage") for _ in range(12)]
                await check_ended(begun)
            assert [a.status_code for a in answers].count(429) >= 1
            await check_together(client)
    lines = [r.message for r in caplog.records if r.name == "llm_service.state"]
    assert len(lines) == 2
    assert lines[0].startswith("shared state: Redis is away")
    assert lines[1] == "shared state: Redis is back"
    assert KEY not in caplog.text
