"""A full engine: which requests are rejected, how early, and which are answered."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import httpx
import pytest
import pytest_asyncio

from app.api.load_shedding import LoadShedding
from app.llm.client.client import EngineClient, EngineState
from app.utils.errors import OverloadedError
from benchmarks.load.targets import Route, Target
from benchmarks.overload import overload
from tests.support.application import OTHER, Client, start
from tests.support.live import LONG, generate, open_stream
from tests.support.raw import KEY as KEY_HEADER
from tests.support.raw import LIVEZ, RawClient, chunked, post
from tests.support.service import API_KEY, running_service

ROUTES = {
    "/v1/generate": {"prompt": "new"},
    "/v1/chat": {"messages": [{"role": "user", "content": "new"}]},
    "/v1/completions": {"model": "default", "prompt": "new"},
    "/v1/chat/completions": {"model": "default", "messages": [{"role": "user", "content": "new"}]},
}
KEPT = {"prompt": "kept", "temperature": 0}


SCRAPER = "key-of-the-scraper"

# These tests share an application, which lives on one event loop.
shared = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small() -> AsyncIterator[Client]:
    """A service with two places, after it has answered one request."""
    keys = [
        {"name": "bob", "key": OTHER},
        {"name": "scraper", "key": SCRAPER, "scopes": ["metrics"]},
    ]
    async with start(
        engine={"max_running": 1, "max_waiting": 1}, security={"api_keys": keys}
    ) as client:
        first = await client.http.post("/v1/generate", json=KEPT)
        assert first.status_code == 200
        yield client


@asynccontextmanager
async def filled(client: Client) -> AsyncIterator[None]:
    """Takes both places of a service for as long as the block."""
    places = [client.services.engine.admit("somebody") for _ in range(2)]
    yield
    for place in places:
        place.release()


@pytest_asyncio.fixture(loop_scope="module")
async def full(small: Client) -> AsyncIterator[Client]:
    """The service, with every place taken."""
    async with filled(small):
        yield small


def code_of(response: httpx.Response) -> str:
    """An error's code."""
    code: str = response.json()["error"]["code"]
    return code


@shared
@pytest.mark.parametrize("path", ROUTES)
async def test_a_request_without_a_place_is_not_even_parsed(full: Client, path: str) -> None:
    """With every place taken, a body is rejected unparsed, and each rejection is counted once."""
    registry = full.services.metrics.registry
    name, labels = "llm_requests_rejected_total", {"reason": "overloaded"}
    before = registry.get_sample_value(name, labels) or 0
    for body in (b"{", b'{"unknown": 1}'):
        refused = await full.http.post(path, content=body)
        assert (refused.status_code, code_of(refused)) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
    refused = await full.http.post(path, json=ROUTES[path])
    assert code_of(refused) == "overloaded"
    assert registry.get_sample_value(name, labels) == before + 3


@shared
async def test_a_key_is_checked_first(full: Client) -> None:
    """Without a key for it, a caller does not learn that the engine is full."""
    for key, code in (("wrong", "invalid_api_key"), (SCRAPER, "insufficient_scope")):
        refused = await full.http.post("/v1/chat", content=b"{", headers={"X-API-Key": key})
        assert code_of(refused) == code


@shared
async def test_cached_answers_need_no_place(full: Client) -> None:
    """A repeated request is answered from the cache, for the same caller alone."""
    again = await full.http.post("/v1/generate", json=KEPT)
    assert again.status_code == 200
    assert again.json()["cached"] is True
    other = await full.http.post("/v1/generate", json=KEPT, headers={"X-API-Key": OTHER})
    assert code_of(other) == "overloaded"


async def test_an_answer_under_way_is_shared_by_a_full_engine() -> None:
    """A request that is sent again while it is being answered needs no second place."""
    async with start(
        engine={"max_running": 1, "max_waiting": 0, "echo_step_seconds": 0.02}
    ) as client:
        asked = {"prompt": "both of us", "temperature": 0}
        first = asyncio.create_task(client.http.post("/v1/generate", json=asked))
        async with asyncio.timeout(10):
            while client.services.engine.is_idle:  # noqa: ASYNC110 - another task of the service
                await asyncio.sleep(0.001)
        assert code_of(await client.http.post("/v1/generate", json={"prompt": "x"})) == "overloaded"
        second = await client.http.post("/v1/generate", json=asked)
        assert second.json()["generated_text"] == (await first).json()["generated_text"]


@shared
async def test_a_repeated_request_is_answered_by_its_idempotency_key(small: Client) -> None:
    """A client that lost its answer gets it from a full engine too."""
    headers, asked = {"Idempotency-Key": "once"}, {"prompt": "a", "cache": False}
    first = await small.http.post("/v1/generate", json=asked, headers=headers)
    async with filled(small):
        again = await small.http.post("/v1/generate", json=asked, headers=headers)
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.content == first.content


@shared
async def test_what_needs_no_place_is_answered(full: Client) -> None:
    """A full engine counts tokens and lists models."""
    counted = await full.http.post("/v1/tokenize", json={"text": "abc"})
    assert counted.json()["count"] == 3
    assert (await full.http.get("/v1/models")).status_code == 200


def test_a_full_service_rejects_over_its_sockets() -> None:
    """The rejection does not depend on how a request is sent, and the connection goes on."""
    body = b'{"prompt": "new"}'
    sized = f"Content-Length: {len(body)}"
    many = b'{"prompt": "%s"}' % (b"x" * 300_000)
    forms = {
        "in one piece": (post(KEY_HEADER, sized, body=body),),
        "in chunks": (post(KEY_HEADER, "Transfer-Encoding: chunked", body=chunked(body)),),
        "in two pieces": (post(KEY_HEADER, sized), body),
        "long": (post(KEY_HEADER, f"Content-Length: {len(many)}", body=many),),
        "not JSON": (post(KEY_HEADER, "Content-Length: 1", body=b"{"),),
    }
    with (
        running_service(
            ENGINE__MAX_RUNNING="1", ENGINE__MAX_WAITING="0", ENGINE__ECHO_STEP_SECONDS="0.05"
        ) as service,
        open_stream(service, generate(LONG)),
        RawClient(service) as client,
    ):
        counted = {"method": "POST", "endpoint": "/v1/generate", "status": "503"}
        before = service.metric("http_requests_total", **counted)
        for name, pieces in forms.items():
            client.send(*pieces, pause=0.05)
            answer = client.answer()
            assert (name, answer.status, answer.code) == (name, 503, "overloaded")
            assert int(answer.headers["retry-after"]) >= 1
            assert client.ask(LIVEZ).status == 200
        assert service.metric("http_requests_total", **counted) == before + len(forms)
        wrong = client.ask(post("X-API-Key: wrong", sized, body=body))
        assert (wrong.status, wrong.code) == (401, "invalid_api_key")
        lines = service.lines(lambda e: e.get("status_code") == 503, len(forms))
        assert [e["message"] for e in lines[-5:]] == ["POST /v1/generate - 503"] * 5


class CountingEngine:
    """An engine that is full or not, and counts how often it is asked."""

    state = EngineState.READY

    def __init__(self) -> None:
        self.asked = 0
        self.is_full = False

    def check(self, _caller: str) -> None:
        """Reject a caller while it is full."""
        self.asked += 1
        if self.is_full:
            raise OverloadedError(retry_after=1)


def test_few_bodies_are_remembered() -> None:
    """The oldest body is forgotten first, and a rejected one is not remembered."""
    engine = CountingEngine()
    shedding = LoadShedding(cast("EngineClient", engine), remembered=2)
    for body in (b"1", b"2", b"2", b"3"):
        shedding.check("k", {}, body)
    assert engine.asked == 3
    engine.is_full = True
    shedding.check("k", {}, b"3")
    for _ in range(2):
        with pytest.raises(OverloadedError):
            shedding.check("k", {}, b"1")


async def test_ten_times_the_capacity_for_a_moment() -> None:
    """Under an overload every request ends exactly once, as client and service both count it.

    ``make overload`` does this for two minutes with a real model, and judges the speed as well.
    """
    with running_service(
        ENGINE__MAX_RUNNING="4",
        ENGINE__MAX_WAITING="48",
        ENGINE__ECHO_STEP_SECONDS="0.01",
        LOGGING__LEVEL="ERROR",
    ) as service:
        target = Target(service.base_url, Route.CHAT, API_KEY)
        found = await overload(
            target, service.process.pid, factor=10, duration=2.3, rounds=1, peak_requests=48
        )
        (one,) = found["rounds"]
        assert service.raw_log().count('"ERROR"') == 0
    assert one["failed"] == 0
    assert one["refused"] > one["completed"] > 0
    assert one["completed"] + one["refused"] == one["sent"] == one["counted"]
    assert (one["completed"], one["refused"]) == (one["counted_completed"], one["counted_refused"])
    assert set(one["errors"]) == {"overloaded"}
