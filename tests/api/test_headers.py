"""The headers of every response."""

import re

import pytest
from starlette.responses import Response
from starlette.testclient import TestClient

from app.main import create_app
from tests.conftest import make_settings
from tests.support.sse import parse

PROMPT = {"prompt": "hello", "max_tokens": 3}


def test_every_response_has_an_id_and_a_time(client: TestClient) -> None:
    """Answers, streams and errors all carry X-Request-ID and X-Process-Time in seconds."""
    responses = [
        client.get("/health"),
        client.get("/metrics"),
        client.get("/nothing"),
        client.put("/v1/chat"),
        client.post("/v1/generate", json=PROMPT),
        client.post("/v1/generate", json={**PROMPT, "stream": True}),
        client.post("/v1/generate", json={}),
        client.post("/v1/generate", content=b"{"),
        client.post("/v1/generate", json=PROMPT, headers={"X-API-Key": "wrong"}),
        client.post("/v1/generate", content=b"x" * 2_000_000),
    ]
    assert {r.status_code for r in responses} == {200, 400, 401, 404, 405, 413, 422}
    ids = [r.headers["x-request-id"] for r in responses]
    assert len(set(ids)) == len(ids)
    for response in responses:
        assert re.fullmatch(r"req-[0-9a-f]{32}", response.headers["x-request-id"])
        assert re.fullmatch(r"\d+\.\d{6}", response.headers["x-process-time"])
        assert float(response.headers["x-process-time"]) < 60


@pytest.mark.parametrize("given", ["a", "trace-1.2:3_4", "A" * 128])
def test_a_sane_request_id_is_kept(client: TestClient, given: str) -> None:
    """A caller's id of up to 128 harmless characters is used and returned."""
    assert client.get("/livez", headers={"X-Request-ID": given}).headers["x-request-id"] == given


@pytest.mark.parametrize(
    "given",
    ["", "a" * 129, "a b", "a\tb", "a,b", '"a"', "{}", "é".encode(), b"\xff\xfe", "%0a", "<a>"],
)
def test_an_odd_request_id_is_replaced(client: TestClient, given: str | bytes) -> None:
    """An id that could harm a log is replaced by a generated one."""
    response = client.get("/livez", headers=[(b"X-Request-ID", _bytes(given))])
    assert re.fullmatch(r"req-[0-9a-f]{32}", response.headers["x-request-id"])


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def test_an_error_names_the_request_id_of_its_header(client: TestClient) -> None:
    """The id of the X-Request-ID header is in the error's body too."""
    response = client.get("/nothing", headers={"X-Request-ID": "mine-1"})
    assert response.json()["error"]["request_id"] == "mine-1"


def test_streams_are_not_stored_or_buffered(client: TestClient) -> None:
    """A stream has headers that forbid proxies to store or to buffer it."""
    response = client.post("/v1/generate", json={**PROMPT, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    assert parse(response.text, response.headers).text == "hel"  # type: ignore[arg-type]


def test_every_response_tells_browsers_what_they_may_do(client: TestClient) -> None:
    """Browsers may not store, sniff or frame any response."""
    for response in (
        client.get("/health"),
        client.get("/nothing"),
        client.post("/v1/generate", json=PROMPT),
        client.post("/v1/generate", json={**PROMPT, "stream": True}),
        client.post("/v1/generate", json=PROMPT, headers={"X-API-Key": "wrong"}),
        client.post("/v1/generate", content=b"x" * 2_000_000),
        client.get("/docs"),
        client.get("/"),
        client.get("/playground/app.js"),
    ):
        assert response.headers.get_list("cache-control") == ["no-store"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        policy = response.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy
        assert "default-src 'none'" in policy


def test_a_response_may_be_stricter_or_looser_itself() -> None:
    """A header that a route sets stays as it is, so that a page can bring its own policy."""
    app = create_app(make_settings())

    @app.get("/page")
    async def page() -> Response:
        return Response("x", headers={"Content-Security-Policy": "script-src 'self'"})

    response = TestClient(app).get("/page")
    assert response.headers.get_list("content-security-policy") == ["script-src 'self'"]


def test_no_limit_headers_while_limits_are_off(client: TestClient) -> None:
    """Without rate limits no response has the headers of a limit."""
    response = client.post("/v1/generate", json=PROMPT)
    assert not [name for name in response.headers if name.startswith("x-ratelimit")]
