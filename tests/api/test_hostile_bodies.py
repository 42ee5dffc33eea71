"""Hostile bodies and headers, to every route that takes a body: an early 4xx, never a 500."""

import json
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.api.requests import MAX_FAULTS
from app.main import create_app
from tests.api.test_errors import NOT_JSON, check_error, post_bytes
from tests.conftest import make_settings
from tests.contract.test_openapi import OPERATIONS, WITH_BODY, document
from tests.support.raw import KEY, RawClient, post
from tests.support.service import API_KEY, Service

# Longest time for which a body may block the event loop, as the mean of some.
LIMIT_SECONDS = 0.05
REPEATS = 2

_CHAT = [{"role": "user", "content": "a"}]
# The smallest body that each route accepts.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/generate": {"prompt": "a"},
    "/v1/chat": {"messages": _CHAT},
    "/v1/chat/completions": {"model": "echo", "messages": _CHAT},
    "/v1/completions": {"model": "echo", "prompt": "a"},
    "/v1/responses": {"model": "echo", "input": "a"},
    "/v1/tokenize": {"text": "a"},
}

# As large as security.max_body_bytes allows.
MEBIBYTE = 2**20
UNREADABLE = {
    **NOT_JSON,
    "deep list of a mebibyte": b"[" * MEBIBYTE,
    "deep object of a mebibyte": b'{"a":' * (MEBIBYTE // 5),
    "deep member of a stream": b'{"stream": true, "stop": %b' % (b"[" * 900_000),
    "a mebibyte of digits": b'{"max_tokens": ' + b"9" * (MEBIBYTE - 100) + b"}",
    "5,000 digits below 0": b'{"seed": -' + b"9" * 5000 + b"}",
    "5,000 digits in a stream": b'{"stream": true, "n": ' + b"9" * 5000 + b"}",
    "bad UTF-8 behind a mebibyte": b'{"prompt": "' + b"a" * (MEBIBYTE - 100) + b'\xff"}',
    "bad UTF-8 in a stream": b'{"stream": true, "prompt": "\xed\xa0\x80"}',
    "bad UTF-8 in a name": b'{"\xff": 1}',
    "an overlong encoding": b'{"prompt": "\xc0\xaf"}',
    "surrogates of a mebibyte": b'{"prompt": "' + b"\\ud800" * (MEBIBYTE // 6 - 10) + b'"}',
}

# Values, as JSON or nearly JSON, that might break some field.
HOSTILE = {
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "beyond all floats": "1e999",
    "lone surrogate": '"\\ud800"',
    "null byte": '"\\u0000"',
    "true": "true",
    "text": '"16"',
    "fraction": "1.5",
    "below 0": "-1",
    "huge": "1000000000000000000",
    "beyond 64 bits": "9" * 30,
    "null": "null",
    "list": "[]",
    "list of null": "[null]",
    "object": "{}",
    "NaN inside": '{"a": [NaN]}',
}
NO_JSON = ("NaN", "Infinity", "lone surrogate", "NaN inside")

each_route = pytest.mark.parametrize("path", BODIES)


def test_every_route_with_a_body_is_here() -> None:
    """Every route that takes a body is tested here."""
    assert {f"POST {path}" for path in BODIES} == set(WITH_BODY)


@each_route
def test_what_cannot_be_read_is_400_at_once(echo_service: Service, path: str) -> None:
    """A deep, long or broken body gets 400 for at most 50 ms of processor time."""
    with echo_service.client() as client:
        for name, body in UNREADABLE.items():
            before = _processor_seconds(echo_service)
            for _ in range(REPEATS):
                check_error(client.post(path, content=body), 400, "invalid_json")
            each = (_processor_seconds(echo_service) - before) / REPEATS
            assert each < LIMIT_SECONDS, (name, each)


def _processor_seconds(service: Service) -> float:
    """Processor time that the API process has used; other programs do not count."""
    # The number of another process' clock, as clock_getcpuclockid(3) makes it on Linux.
    return time.clock_gettime((~service.process.pid << 3) | 2)


@each_route
def test_no_value_of_any_field_is_a_500(echo_service: Service, path: str) -> None:
    """Invalid JSON gets 400, a wrong value 400 or 422, and anything else is served."""
    refused = 0
    with RawClient(echo_service) as client:
        for field in _fields(path):
            rest = json.dumps({k: v for k, v in BODIES[path].items() if k != field})
            rest = rest[1:-1] or '"x": 1'
            # One connection takes them all at once, which costs a third of a request each.
            client.send(
                b"".join(_post(path, f'{{"{field}": {v}, {rest}}}') for v in HOSTILE.values())
            )
            for name in HOSTILE:
                answer = client.answer()
                about = (field, name, answer.status, answer.body)
                if name in NO_JSON:
                    assert (answer.status, answer.code) == (400, "invalid_json"), about
                # A model that is not served gets 404, and a response that is not kept.
                named = field in ("model", "previous_response_id")
                expected = {400, 422, 404} if named else {400, 422}
                assert answer.status in {200, *expected}, about
                refused += answer.status != 200
        assert client.ask(_post(path, json.dumps(BODIES[path]))).status == 200
    # A third of the values are wrong for every field.
    assert refused > len(_fields(path)) * len(HOSTILE) / 3


def _post(path: str, body: str) -> bytes:
    """A request with the key."""
    content = body.encode()
    return post(KEY, f"Content-Length: {len(content)}", body=content, path=path)


def _fields(path: str) -> list[str]:
    """Every field of a route's body, also those that are known and not supported."""
    operation = OPERATIONS[f"POST {path}"]
    content = operation["requestBody"]["content"]["application/json"]
    name = content["schema"]["$ref"].rpartition("/")[2]
    return list(document()["components"]["schemas"][name]["properties"])


@each_route
def test_no_header_and_no_query_is_a_500(echo_service: Service, path: str) -> None:
    """Invalid bytes and long values in a header or a query are rejected or ignored."""
    values = (b"\xff\xfe", b"\xed\xa0\x80", b"9" * 5000, b"NaN", b"[" * 5000)
    names = (
        *("X-Session-ID", "X-Request-Timeout", "Idempotency-Key", "X-Request-ID"),
        *("Content-Type", "Cache-Control", "X-Forwarded-For", "Accept", "traceparent"),
    )
    with echo_service.client() as client:
        for value in values:
            for name in names:
                headers = [(name.encode(), value)]
                response = client.post(path, json=BODIES[path], headers=headers)
                assert response.status_code in (200, 400, 422), (name, value[:9], response.text)
            query = b"a=%ff&%00[[[[=%" + value.hex("%").encode()
            assert client.post(f"{path}?{query.decode()}", json=BODIES[path]).status_code == 200


# --- Very many faults -----------------------------------------------------------------------------

_BIAS = {f"x{i}": 1 for i in range(50_000)}
FLOODS: dict[str, dict[str, Any]] = {
    "unknown fields": {str(i): 1 for i in range(50_000)},
    "unknown fields of many messages": {
        "messages": [{"role": "user", **{str(i): 1 for i in range(60)}}] * 900
    },
    "keys of a field": {"logit_bias": _BIAS},
}


@pytest.fixture(scope="module")
def unstarted() -> TestClient:
    """An application whose engine was never started, which validation does not need."""
    return TestClient(create_app(make_settings()), headers={"X-API-Key": API_KEY})


@pytest.mark.parametrize("name", FLOODS)
def test_very_many_faults_are_one(unstarted: TestClient, name: str) -> None:
    """A body with 50,000 faults gets one error, since listing them would take half a second."""
    body = json.dumps({"model": "echo", "messages": _CHAT, **FLOODS[name]}).encode()
    error = check_error(
        post_bytes(unstarted, body, "/v1/chat/completions"), 400, "validation_error"
    )
    assert error["message"] == f"more than {MAX_FAULTS} faults"


def test_a_few_faults_are_described(unstarted: TestClient) -> None:
    """With as many faults as a person makes by mistake, the first ones are named."""
    body = {"prompt": "a", **{f"field{i}": i for i in range(MAX_FAULTS)}}
    response = unstarted.post("/v1/generate", json=body)
    assert "field0" in check_error(response, 422, "validation_error", "field0")["message"]
