"""The OpenAPI document equals its snapshot and describes the service.

After an intended change write the snapshot again, and commit it with the change:

    .venv/bin/python -m tests.contract.test_openapi
"""

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.main import create_app
from app.utils.errors import (
    HeadersTooLargeError,
    InternalError,
    MalformedHTTPError,
    MethodNotAllowedError,
    NotFoundError,
    RequestTimeoutError,
    ServiceError,
    TooManyConnectionsError,
)
from tests.conftest import make_settings

SNAPSHOT = Path(__file__).with_name("openapi.json")
ERROR_SCHEMA = {"$ref": "#/components/schemas/ErrorResponse"}
# Errors of every path, which no route declares.
EVERYWHERE = {
    InternalError.code,
    NotFoundError.code,
    MethodNotAllowedError.code,
    # Errors of the connection, which come before a route is known.
    MalformedHTTPError.code,
    RequestTimeoutError.code,
    HeadersTooLargeError.code,
    TooManyConnectionsError.code,
}
# Bases of the errors that are raised.
ABSTRACT = {"invalid_request"}


@cache
def document() -> dict[str, Any]:
    """The document as the service serves it, by way of JSON."""
    made: dict[str, Any] = json.loads(json.dumps(create_app(make_settings()).openapi()))
    return made


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every method of every route of the snapshot, by name.

    To make the document takes half a second, and every process of the tests reads this file.
    """
    snapshot = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    for path, methods in snapshot["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


OPERATIONS = dict(operations())
KEYED = [name for name, operation in OPERATIONS.items() if "security" in operation]
WITH_BODY = [name for name, operation in OPERATIONS.items() if "requestBody" in operation]
GENERATING = ["POST /v1/generate", "POST /v1/chat"]


def declared(name: str) -> set[str]:
    """The error codes that a route declares."""
    responses = OPERATIONS[name]["responses"]
    return {
        code
        for response in responses.values()
        if response.get("content", {}).get("application/json", {}).get("schema") == ERROR_SCHEMA
        for code in response["description"].split(", ")
    }


def routes() -> set[str]:
    """Every method of every route, such as ``GET /health``."""
    return set(OPERATIONS)


def schema_of(name: str) -> dict[str, Any]:
    """The schema of a route's request body."""
    content = OPERATIONS[name]["requestBody"]["content"]["application/json"]["schema"]
    found: dict[str, Any] = document()["components"]["schemas"][content["$ref"].rpartition("/")[2]]
    return found


def service_errors() -> list[type[ServiceError]]:
    """Every error that the service can answer with."""

    def classes(base: type[ServiceError]) -> Iterator[type[ServiceError]]:
        for error in base.__subclasses__():
            yield error
            yield from classes(error)

    # Other tests make errors of their own, and bases have no code of their own.
    own = (e for e in classes(ServiceError) if e.__module__.startswith("app."))
    return [e for e in own if "code" in vars(e) or e is InternalError if e.code not in ABSTRACT]


def test_the_document_is_the_snapshot() -> None:
    """The document changes only together with its snapshot (see this module's docstring)."""
    assert document() == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_the_document_is_what_is_served(client: TestClient) -> None:
    """GET /openapi.json answers with the document, and GET /docs shows it."""
    assert client.get("/openapi.json").json() == document()
    assert '"openapi.json"' in client.get("/docs/start.js").text


@pytest.mark.parametrize("name", WITH_BODY)
def test_every_example_works(client: TestClient, name: str) -> None:
    """Each route that takes a body has an example that is answered with 200."""
    examples = schema_of(name).get("examples")
    assert examples
    for example in examples:
        method, path = name.split()
        response = client.request(method, path, json=example)
        assert response.status_code == 200, response.text


@pytest.mark.parametrize("name", KEYED)
def test_keyed_routes_declare_the_guards_errors(name: str) -> None:
    """A route that needs a key declares the errors of its guard."""
    assert {"invalid_api_key", "rate_limit_exceeded"} <= declared(name)


@pytest.mark.parametrize("name", WITH_BODY)
def test_routes_with_a_body_declare_what_is_wrong_with_it(name: str) -> None:
    """A route that takes a body declares the errors of a body."""
    assert {"invalid_json", "body_too_large", "validation_error"} <= declared(name)


@pytest.mark.parametrize("name", GENERATING)
def test_generating_routes_declare_the_engines_errors(name: str) -> None:
    """A route that generates declares every error of the engine."""
    assert {
        *("overloaded", "model_loading", "draining", "deadline_exceeded"),
        *("engine_unavailable", "engine_failed"),
        *("context_length_exceeded", "unsupported_parameter", "prompt_too_long", "pii_detected"),
    } <= declared(name)


def test_every_error_is_declared_somewhere() -> None:
    """Each error of the service is declared by a route, except those of every path."""
    codes = {error.code for error in service_errors()} - EVERYWHERE
    assert codes - {code for name in OPERATIONS for code in declared(name)} == set()


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_error_has_the_one_shape(name: str) -> None:
    """An error that a route declares has the service's shape, not the framework's."""
    for status, response in OPERATIONS[name]["responses"].items():
        if int(status) >= 400 and int(status) != 503:
            assert response["content"]["application/json"]["schema"] == ERROR_SCHEMA, status


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_route_says_what_it_does(name: str) -> None:
    """Each route has a description, one described tag, and a summary of its own in words."""
    operation = OPERATIONS[name]
    assert operation.get("description")
    (tag,) = operation["tags"]
    assert {t["name"]: t["description"] for t in document()["tags"]}[tag]
    assert len(operation["summary"].split()) >= 3
    assert [o["summary"] for o in OPERATIONS.values()].count(operation["summary"]) == 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_parameter_is_described(name: str) -> None:
    """A parameter has a description, and an example where a request needs it.

    Swagger UI would send the examples of optional headers with every request that it tries.
    """
    for parameter in OPERATIONS[name].get("parameters", []):
        assert parameter.get("description"), parameter["name"]
        assert bool(parameter["schema"].get("examples")) == parameter["required"], parameter["name"]


def test_the_document_says_what_the_service_is() -> None:
    """The document begins with a description, and names the server that served it."""
    assert document()["info"]["description"]
    assert [server["url"] for server in document()["servers"]] == ["/"]


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(document(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"wrote {SNAPSHOT}", file=sys.stderr)  # noqa: T201 - a command's answer
