"""Authentication: every route needs a key, except those on a list of public routes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.routing import Route
from starlette.testclient import TestClient

from app.api.guard import GuardedRoute
from app.main import create_app
from tests.api.test_errors import check_error
from tests.conftest import make_settings, without_key
from tests.support.asgi import Received, Sent, http_scope
from tests.support.service import API_KEY, OTHER_KEY

PUBLIC = {
    *("/health", "/livez", "/readyz", "/status", "/metrics"),
    *("/", "/playground/{name:path}", "/docs", "/docs/{name:path}", "/openapi.json"),
}

PROMPT = {"prompt": "hello", "max_tokens": 3}


@dataclass(frozen=True)
class Endpoint:
    """One method of one path."""

    method: str
    path: str


def endpoints(app: FastAPI) -> Iterator[Endpoint]:
    """Every method of every path of ``app``; an unknown kind of route fails the test."""
    for route in app.routes:
        found = route.effective_candidates() if hasattr(route, "effective_candidates") else [route]
        for candidate in found:
            yield from _methods(candidate)


def _methods(route: Any) -> Iterator[Endpoint]:
    original = getattr(route, "original_route", route)
    assert isinstance(original, Route), f"a route of a kind this test does not know: {route}"
    for method in sorted(route.methods or ()):
        yield Endpoint(method, route.path)


def new_app(**app_section: Any) -> FastAPI:
    """An application whose engine is not started."""
    return create_app(make_settings(app=app_section))


APP = new_app()
KEYED = [e for e in endpoints(APP) if e.path not in PUBLIC]


def test_the_keyed_routes_are_found() -> None:
    """The generating routes are among those found, so the tests below cannot pass on none."""
    assert {Endpoint("POST", "/v1/generate"), Endpoint("POST", "/v1/chat")} <= set(KEYED)


def test_a_new_route_is_walked() -> None:
    """A route that is added later is found, and a router's routes with their prefix."""
    app = new_app()

    @app.get("/new")
    async def new() -> None: ...

    assert Endpoint("GET", "/new") in set(endpoints(app))


HEADERS: dict[str, dict[str, str]] = {
    "no key": {},
    "empty key": {"X-API-Key": ""},
    "wrong key": {"X-API-Key": "wrong"},
    "beginning of the key": {"X-API-Key": API_KEY[:-1]},
    "key and more": {"X-API-Key": API_KEY + "x"},
    "other case": {"X-API-Key": API_KEY.upper()},
    "wrong bearer": {"Authorization": "Bearer wrong"},
    "empty bearer": {"Authorization": "Bearer "},
    "basic": {"Authorization": f"Basic {API_KEY}"},
    "no scheme": {"Authorization": API_KEY},
    "cookie": {"Cookie": f"X-API-Key={API_KEY}"},
    "wrong key beside a right bearer": {
        "X-API-Key": "wrong",
        "Authorization": f"Bearer {API_KEY}",
    },
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS.keys())
@pytest.mark.parametrize("endpoint", KEYED, ids=lambda e: f"{e.method} {e.path}")
async def test_every_route_is_refused_without_a_key(
    endpoint: Endpoint, headers: dict[str, str]
) -> None:
    """Every route that is not public answers 401 without a valid key, before it reads the body."""
    received, sent = Received(b'{"prompt": "a"}'), Sent()
    path = endpoint.path.replace("{", "").replace("}", "")
    await APP(http_scope(endpoint.method, path, headers), received, sent)
    assert sent.status == 401
    assert received.taken == 0
    assert sent.headers["www-authenticate"].startswith("Bearer")
    assert json.loads(sent.body)["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("endpoint", KEYED, ids=lambda e: f"{e.method} {e.path}")
async def test_a_body_over_the_limit_does_not_tell_more_than_401(endpoint: Endpoint) -> None:
    """Without a key the answer is 401, and an endless body is not read."""
    received, sent = Received(b"x" * 100_000, endless=True), Sent()
    path = endpoint.path.replace("{", "").replace("}", "")
    await APP(http_scope(endpoint.method, path), received, sent)
    assert (sent.status, received.taken) == (401, 0)


def test_no_key_and_a_wrong_key_get_the_same_answer() -> None:
    """The response is the same for a missing and a wrong key, and never contains the key."""
    client = TestClient(APP)
    answers = []
    for headers in HEADERS.values():
        response = client.post("/v1/generate", json=PROMPT, headers=headers)
        error = check_error(response, 401, "invalid_api_key")
        assert API_KEY[:10] not in response.text
        answers.append({**error, "request_id": None})
    assert all(answer == answers[0] for answer in answers)
    assert answers[0]["type"] == "authentication_error"


@pytest.mark.parametrize(
    "headers",
    [
        {"X-API-Key": API_KEY},
        {"X-API-Key": OTHER_KEY},
        {"Authorization": f"Bearer {API_KEY}"},
        {"Authorization": f"bearer {API_KEY}"},
        {"Authorization": f"Bearer   {OTHER_KEY} "},
        {"X-API-Key": API_KEY, "Authorization": "Basic eDp5"},
    ],
    ids=["header", "other key", "bearer", "lower case", "spaces", "beside another scheme"],
)
def test_a_valid_key_is_let_in(client: TestClient, headers: dict[str, str]) -> None:
    """Each configured key is accepted in X-API-Key and as a bearer token."""
    response = without_key(client).post("/v1/generate", json=PROMPT, headers=headers)
    assert response.status_code == 200, response.text


def test_public_routes_need_no_key(client: TestClient) -> None:
    """Health, status and metrics answer without a key, as the user's document shows."""
    anonymous = without_key(client)
    for path in ("/health", "/livez", "/readyz", "/status", "/metrics"):
        assert anonymous.get(path).status_code == 200


def test_production_hides_the_interactive_documentation() -> None:
    """In production the documentation, the OpenAPI document and the playground are not served."""
    settings = {"security": {"api_key": "k" * 32, "api_keys": []}}
    app = create_app(make_settings(app={"environment": "production"}, **settings))
    anonymous = TestClient(app)
    for path in ("/docs", "/docs/start.js", "/openapi.json", "/redoc", "/", "/playground/app.js"):
        check_error(anonymous.get(path), 404, "not_found")


def test_every_keyed_route_declares_its_errors() -> None:
    """The OpenAPI document names 401 for every route that can answer it, and both key schemes."""
    document = APP.openapi()
    assert set(document["components"]["securitySchemes"]) == {"APIKeyHeader", "HTTPBearer"}
    for endpoint in KEYED:
        path = endpoint.path.replace(":path}", "}")
        operation = document["paths"][path][endpoint.method.lower()]
        assert "401" in operation["responses"], endpoint
        assert operation["security"], endpoint


def test_the_guard_stands_on_every_keyed_route() -> None:
    """Every route that is not public is a GuardedRoute, so the guard runs before its body."""
    keyed = [route for route in APP.routes if getattr(route, "path", "") not in PUBLIC]
    assert len(keyed) >= len({endpoint.path for endpoint in KEYED}) > 5
    for route in keyed:
        assert isinstance(route, GuardedRoute), route
