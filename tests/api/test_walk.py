"""The limits hold on every route that needs a key."""

import json

import pytest

from app.main import create_app
from tests.api.test_auth import KEYED, Endpoint
from tests.conftest import make_settings
from tests.support.asgi import Received, Sent, http_scope
from tests.support.service import API_KEY

MAX_BODY = 2048
KEY = {"X-API-Key": API_KEY}

each_keyed_route = pytest.mark.parametrize("endpoint", KEYED, ids=lambda e: f"{e.method} {e.path}")


def path_of(endpoint: Endpoint) -> str:
    """A path of the route."""
    return endpoint.path.replace("{", "").replace("}", "")


@each_keyed_route
async def test_the_rate_limit_bites(endpoint: Endpoint) -> None:
    """A caller over its limit gets 429 with its headers, and its body is not read."""
    app = create_app(make_settings(rate_limit={"enabled": True, "burst_size": 1}))
    scope = http_scope(endpoint.method, path_of(endpoint), KEY)
    await app(scope, Received(b"{}"), Sent())
    received, sent = Received(b"{}"), Sent()
    await app(http_scope(endpoint.method, path_of(endpoint), KEY), received, sent)
    assert (sent.status, received.taken) == (429, 0)
    assert json.loads(sent.body)["error"]["code"] == "rate_limit_exceeded"
    assert int(sent.headers["retry-after"]) >= 1
    assert sent.headers["x-ratelimit-remaining"] == "0"


@each_keyed_route
async def test_the_body_limit_bites(endpoint: Endpoint) -> None:
    """A body over the limit is 413: at once if it is announced, else when the limit is reached."""
    app = create_app(make_settings(security={"max_body_bytes": MAX_BODY}))
    announced = {**KEY, "Content-Length": str(MAX_BODY + 1)}
    received, sent = Received(b"x"), Sent()
    await app(http_scope(endpoint.method, path_of(endpoint), announced), received, sent)
    assert (sent.status, received.taken) == (413, 0)
    if endpoint.method == "POST":
        received, sent = Received(b"x" * 1000, endless=True), Sent()
        await app(http_scope(endpoint.method, path_of(endpoint), KEY), received, sent)
        assert sent.status == 413
        assert received.taken == 3
        assert json.loads(sent.body)["error"]["code"] == "body_too_large"
