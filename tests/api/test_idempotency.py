"""The header Idempotency-Key on every route that takes a body."""

import asyncio
import json
from typing import Annotated, Any
from uuid import uuid4

import httpx
import pytest
from fastapi import APIRouter, Body, Response
from fastapi.responses import StreamingResponse
from starlette.testclient import TestClient

from app.api.guard import GuardedRoute
from app.main import create_app
from tests.api.test_errors import check_error
from tests.conftest import make_settings
from tests.contract.test_openapi import OPERATIONS, WITH_BODY, declared
from tests.support.asgi import Leaving, Sent, http_scope
from tests.support.live import LONG, generate
from tests.support.service import API_KEY, OTHER_KEY, Service

HEADER = "Idempotency-Key"
ROUTES = ["/v1/generate", "/v1/chat", "/v1/chat/completions", "/v1/completions"]


def once(key: str | None = None, **headers: str) -> dict[str, Any]:
    """Headers with a new idempotency key."""
    return {"headers": {HEADER: key or str(uuid4()), **headers}}


def body_of(route: str, text: str = "hello", **fields: Any) -> dict[str, Any]:
    """A request that says ``text``; a native one is not answered from the response cache."""
    chat = {"messages": [{"role": "user", "content": text}]}
    content: dict[str, Any] = chat if "chat" in route else {"prompt": text}
    own: dict[str, Any] = {"model": "echo"} if "completions" in route else {"cache": False}
    return {**content, **own, **fields}


# --- On the service's own routes ------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ROUTES)
def test_the_same_request_gets_the_same_bytes(client: TestClient, route: str, stream: bool) -> None:
    """A repeated request is answered with the first one's bytes, and generates nothing."""
    metrics = client.app.state.services.metrics.registry  # type: ignore[attr-defined]
    body, key = body_of(route, stream=stream), once(**{"Cache-Control": "no-cache"})
    first = client.post(route, json=body, **key)
    generated = metrics.get_sample_value("tokens_generated_total", {"model": "echo"})
    second = client.post(route, json=body, **key)
    assert (first.status_code, second.status_code) == (200, 200)
    assert second.content == first.content
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"
    for header in ("content-type", "cache-control", "x-accel-buffering"):
        assert second.headers.get(header) == first.headers.get(header)
    assert second.headers["x-request-id"] != first.headers["x-request-id"]
    assert metrics.get_sample_value("tokens_generated_total", {"model": "echo"}) == generated
    assert ("data: [DONE]" in second.text) is stream
    other = client.post(route, json=body_of(route, "other", stream=stream), **key)
    check_error(other, 422, "idempotency_key_reused", HEADER)


def test_a_repeated_turn_is_in_the_session_once(client: TestClient) -> None:
    """A repeated turn is in its session once."""
    session = str(uuid4())
    body, key = body_of("/v1/chat", session_id=session), once()
    for _ in range(3):
        assert client.post("/v1/chat", json=body, **key).status_code == 200
    assert len(client.get(f"/v1/sessions/{session}").json()["messages"]) == 2


def test_another_callers_key_is_another_key(client: TestClient) -> None:
    """The same idempotency key of another caller belongs to another request."""
    key = str(uuid4())
    client.post("/v1/generate", json=body_of("/v1/generate", "mine"), **once(key))
    theirs = once(key, **{"X-API-Key": OTHER_KEY})
    response = client.post("/v1/generate", json=body_of("/v1/generate", "theirs"), **theirs)
    assert response.json()["generated_text"] == "theirs"
    assert "idempotency-replayed" not in response.headers


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_failed_answer_frees_its_key(client: TestClient, stream: bool) -> None:
    """After a fault, as a status or inside a stream, the same request runs again."""
    key = once()
    body = body_of("/v1/generate", "[echo:fault]", stream=stream)
    for _ in range(2):
        response = client.post("/v1/generate", json=body, **key)
        assert "internal_error" in response.text
        assert "idempotency-replayed" not in response.headers


def test_a_refused_request_frees_its_key(client: TestClient) -> None:
    """After a client error the corrected request may use the same key."""
    key = once()
    for wrong in ({}, {"prompt": ""}, {"prompt": "x" * 5000}, {"prompt": "x", "max_tokens": 0}):
        assert client.post("/v1/generate", json=wrong, **key).status_code == 422
    assert client.post("/v1/generate", content=b"{", **key).status_code == 400
    assert client.post("/v1/generate", json={"prompt": "x"}, **key).status_code == 200


def test_a_caller_that_leaves_frees_its_key(slow_service: Service) -> None:
    """A client that leaves before the end of its answer may send the request again."""
    key = once()
    for stream in (False, True):
        body = generate(LONG, max_tokens=20, stream=stream)
        with slow_service.client() as client, pytest.raises(httpx.ReadTimeout):
            # The stream's first byte comes at once, its second one after a step of 50 ms.
            client.post("/v1/generate", json=body, timeout=httpx.Timeout(60, read=0.02), **key)
        slow_service.wait_for_metric("llm_requests_running", 0)

    # The key is in use until the response has ended, shortly after the generation.
    def answered() -> bool:
        with slow_service.client() as client:
            response = client.post("/v1/generate", json=generate("b", max_tokens=1), **key)
        assert response.status_code in (200, 409, 422)
        return response.status_code == 200

    slow_service.wait_for(answered, "a free key")


@pytest.mark.parametrize("name", WITH_BODY)
def test_every_route_with_a_body_declares_the_header(name: str) -> None:
    """The OpenAPI document has the header and both of its errors on each of these routes."""
    (parameter,) = [p for p in OPERATIONS[name]["parameters"] if p["name"] == HEADER]
    assert parameter["in"] == "header"
    assert {"idempotency_key_in_use", "idempotency_key_reused"} <= declared(name)


# --- On a route that knows nothing of it ----------------------------------------------------------

NONE: list[str] = []


class Counting:
    """An application with one more route, behind the guard; no engine runs.

    Attributes:
        calls: Times the route was called.
        called: Set at the first call.
        may_answer: The route waits while this is not set.
    """

    def __init__(self, **sections: Any) -> None:
        self.calls = 0
        self.called = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.app = create_app(make_settings(**sections))
        router = APIRouter(route_class=GuardedRoute)
        router.add_api_route("/count", self._count, methods=["POST"])
        self.app.include_router(router)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app),
            base_url="http://test",
            headers={"X-API-Key": API_KEY},
        )

    async def _count(
        self, status: Annotated[int, Body()] = 200, chunks: Annotated[list[str], Body()] = NONE
    ) -> Response:
        self.calls += 1
        self.called.set()
        await self.may_answer.wait()
        if chunks:

            async def pieces() -> Any:
                for chunk in chunks:
                    yield chunk

            return StreamingResponse(pieces(), status, media_type="text/event-stream")
        return Response(f"{self.calls}", status)

    async def post(self, body: Any = None, **options: Any) -> httpx.Response:
        """A request to the route."""
        return await self.client.post("/count", json=body or {}, **options)


@pytest.fixture
def counting() -> Counting:
    """See :class:`Counting`."""
    return Counting()


async def test_a_request_is_in_progress_until_it_is_answered(counting: Counting) -> None:
    """While a request runs its repetition is 409, another body 422; later its answer comes."""
    counting.may_answer.clear()
    key = once()
    first = asyncio.create_task(counting.post(**key))
    await counting.called.wait()
    check_error(await counting.post(**key), 409, "idempotency_key_in_use", HEADER)
    check_error(await counting.post({"status": 201}, **key), 422, "idempotency_key_reused", HEADER)
    counting.may_answer.set()
    assert (await first).text == (await counting.post(**key)).text == "1"
    assert counting.calls == 1


@pytest.mark.parametrize(
    "change",
    [
        {"content": b"{ }"},
        {"params": {"a": "b"}},
        {"headers": {"X-Session-ID": "s"}},
        {"headers": {"X-Session-Replace": "2"}},
        {"url": "/v1/chat"},
    ],
    ids=["body", "query", "session", "replaced", "route"],
)
async def test_any_difference_makes_another_request(
    counting: Counting, change: dict[str, Any]
) -> None:
    """A key belongs to one body, byte for byte, one path and one session."""
    key = once()
    await counting.post(**key)
    request: dict[str, Any] = {"url": "/count", "content": b"{}", **change}
    request["headers"] = {**key["headers"], **change.get("headers", {})}
    check_error(await counting.client.post(**request), 422, "idempotency_key_reused", HEADER)


async def test_how_it_is_delivered_makes_no_difference(counting: Counting) -> None:
    """A retry may have another request id, another timeout and another client's headers."""
    key = str(uuid4())
    await counting.post(**once(key))
    for headers in ({"X-Request-ID": "other"}, {"X-Request-Timeout": "9"}, {"User-Agent": "x"}):
        response = await counting.post(**once(key, **headers))
        assert response.headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize("status", [200, 201, 204])
async def test_successes_are_kept(counting: Counting, status: int) -> None:
    """Every success is repeated with its status."""
    key = once()
    responses = [await counting.post({"status": status}, **key) for _ in range(2)]
    assert [r.status_code for r in responses] == [status] * 2
    assert counting.calls == 1


@pytest.mark.parametrize("status", [302, 400, 401, 409, 422, 429, 499, 500, 503, 504])
async def test_anything_else_frees_the_key(counting: Counting, status: int) -> None:
    """An error is not repeated: the next attempt runs again."""
    key = once()
    for _ in range(2):
        response = await counting.post({"status": status}, **key)
        assert "idempotency-replayed" not in response.headers
    assert counting.calls == 2


DONE = "data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("chunks", "kept"),
    [
        (["data: {}\n\n", DONE], True),
        (["data: {}\n\n" + DONE], True),
        (["data: {}\n\n", 'data: {"error":{}}\n\n', DONE], False),
        (['data: {}\n\ndata: {"error":{}}\n\n', DONE], False),
        (['data: {"text":"data: {\\"error\\":{}}"}\n\n', DONE], True),
        (["x" * 20_000], False),
    ],
    ids=["chunks", "joined", "error", "joined error", "text like an error", "too large"],
)
async def test_which_streams_are_kept(counting: Counting, chunks: list[str], kept: bool) -> None:
    """A stream is kept if it is complete, had no error and is not too large."""
    counting = Counting(idempotency={"max_bytes": 65_536})
    key = once()
    first, second = [await counting.post({"chunks": chunks}, **key) for _ in range(2)]
    assert first.text == second.text == "".join(chunks)
    assert counting.calls == (1 if kept else 2)


async def test_keeping_a_connection_alive_is_not_part_of_the_answer(counting: Counting) -> None:
    """A repeated stream has no keep-alive comments."""
    key = once()
    chunks = ["data: 1\n\n", ": ping\n\n", "data: 2\n\n", DONE]
    await counting.post({"chunks": chunks}, **key)
    repeated = await counting.post({"chunks": chunks}, **key)
    assert repeated.text == "data: 1\n\ndata: 2\n\n" + DONE


async def test_a_cancelled_request_frees_its_key(counting: Counting) -> None:
    """A request that is cancelled before its answer frees its key."""
    counting.may_answer.clear()
    key = once()
    first = asyncio.create_task(counting.post(**key))
    await counting.called.wait()
    first.cancel()
    await asyncio.wait([first])
    counting.may_answer.set()
    assert (await counting.post(**key)).text == "2"


async def test_an_answer_is_there_as_soon_as_its_end_is_seen(counting: Counting) -> None:
    """A client that reads [DONE] and repeats the request at once gets the answer, not 409."""
    body = json.dumps({"chunks": ["data: 1\n\n", DONE]}).encode()
    key = once()
    answers: list[httpx.Response] = []

    class Impatient(Sent):
        async def __call__(self, message: Any) -> None:
            await super().__call__(message)
            if message.get("body", b"").endswith(DONE.encode()):
                answers.append(await counting.client.post("/count", content=body, **key))

    scope = http_scope("POST", "/count", {"X-API-Key": API_KEY, **key["headers"]})
    await counting.app(scope, Leaving(body).receive, Impatient())
    assert answers[0].headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize(
    "value", [b"", b"k" * 256, b"\x7f", b"a\tb", "ä".encode(), b"\xff"], ids=repr
)
async def test_an_odd_key_is_refused(counting: Counting, value: bytes) -> None:
    """A key is 1 to 255 printable ASCII characters; anything else is 422, naming the header."""
    response = await counting.post(headers=[(HEADER.encode(), value)])
    check_error(response, 422, "validation_error", HEADER)
    assert counting.calls == 0


async def test_two_keys_are_refused(counting: Counting) -> None:
    """Two keys in one request are 422."""
    response = await counting.post(headers=[(HEADER, "a"), (HEADER, "b")])
    check_error(response, 422, "validation_error", HEADER)


@pytest.mark.parametrize(
    "value", ["k", "k" * 255, '"8e03978e-40d5-43e8-bc93-6894a57f9324"', "a b~"]
)
async def test_keys_are_taken_as_they_are(counting: Counting, value: str) -> None:
    """A key may be quoted, as in the IETF's draft, or not; it is compared as it was sent."""
    await counting.post(**once(value))
    assert (await counting.post(**once(value))).headers["idempotency-replayed"] == "true"


async def test_keys_that_are_off_are_refused() -> None:
    """With idempotency.enabled false a key is 400: ignoring it could run a request twice."""
    counting = Counting(idempotency={"enabled": False})
    check_error(await counting.post(**once()), 400, "unsupported_parameter", HEADER)
    assert (await counting.post()).status_code == 200


async def test_a_repeated_answer_costs_a_token() -> None:
    """A repeated answer counts against the rate limit, and has the current limit headers."""
    counting = Counting(rate_limit={"enabled": True, "burst_size": 2})
    key = once()
    responses = [await counting.post(**key) for _ in range(3)]
    assert [r.status_code for r in responses] == [200, 200, 429]
    assert [r.headers["x-ratelimit-remaining"] for r in responses] == ["1", "0", "0"]
    assert responses[1].headers.get_list("x-ratelimit-remaining") == ["0"]
    assert responses[1].headers["idempotency-replayed"] == "true"
