"""Every error has one shape, and repeats nothing of the request or of the service's code."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.main import create_app
from tests.conftest import flush_log, make_settings
from tests.support.asgi import Received, Sent, http_scope
from tests.support.service import API_KEY

MEMBERS = {"message", "type", "param", "code", "request_id"}
CANARY = "canary-8d1f"


def check_error(response: Any, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """Assert the one shape and the headers of every error; returns the error object."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    content = response.json()
    assert set(content) == {"error"}
    error: dict[str, Any] = content["error"]
    assert set(error) >= MEMBERS
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"]
    assert error["type"]
    assert error["request_id"] == response.headers["x-request-id"]
    assert float(response.headers["x-process-time"]) >= 0
    return error


def post_bytes(client: TestClient, body: bytes, path: str = "/v1/generate") -> Any:
    """POST a body as it stands."""
    return client.post(path, content=body, headers={"Content-Type": "application/json"})


@pytest.fixture(scope="module")
def unstarted() -> TestClient:
    """An application whose engine is not started: the errors come before the engine."""
    return TestClient(create_app(make_settings()), headers={"X-API-Key": API_KEY})


NOT_JSON = {
    "empty": b"",
    "cut off": b'{"prompt": "a"',
    "trailing": b'{"prompt": "a"} x',
    "single quotes": b"{'prompt': 'a'}",
    "bad UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone low surrogate": b'{"prompt": "a\\udc00b"}',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": Infinity}',
    "-Infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "5,000 digits": b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    "deep list": b"[" * 100_000,
    "deep list, closed": b"[" * 100_000 + b"]" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "deep member": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
}


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/chat"])
@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_not_json_is_400(unstarted: TestClient, body: bytes, path: str) -> None:
    """A body that is not JSON, or that Python cannot represent faithfully, is 400 invalid_json."""
    error = check_error(post_bytes(unstarted, body, path), 400, "invalid_json")
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("field", ["temperature", "top_p", "seed", "max_tokens", "stop", "prompt"])
@pytest.mark.parametrize("number", ["1e999", "-1e999", "1e400"])
def test_a_number_beyond_all_floats_is_refused(
    unstarted: TestClient, field: str, number: str
) -> None:
    """A number that would become an infinity is a client error, in any field."""
    response = post_bytes(unstarted, f'{{"prompt": "a", "{field}": {number}}}'.encode())
    assert response.status_code in (400, 422), response.text
    check_error(
        response,
        response.status_code,
        *(("invalid_json", None) if response.status_code == 400 else ("validation_error", field)),
    )


INVALID = {
    "number as text": ({"prompt": "a", "max_tokens": "16"}, "max_tokens"),
    "boolean for a number": ({"prompt": "a", "max_tokens": True}, "max_tokens"),
    "fraction for an integer": ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
    "whole fraction for an integer": ({"prompt": "a", "max_tokens": 1.0}, "max_tokens"),
    "zero tokens": ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    "too many tokens": ({"prompt": "a", "max_tokens": 513}, "max_tokens"),
    "temperature too high": ({"prompt": "a", "temperature": 2.01}, "temperature"),
    "temperature below 0": ({"prompt": "a", "temperature": -0.01}, "temperature"),
    "temperature as text": ({"prompt": "a", "temperature": "0.7"}, "temperature"),
    "temperature as boolean": ({"prompt": "a", "temperature": True}, "temperature"),
    "top_p of 0": ({"prompt": "a", "top_p": 0}, "top_p"),
    "top_p above 1": ({"prompt": "a", "top_p": 1.1}, "top_p"),
    "huge top_k": ({"prompt": "a", "top_k": 10**30}, "top_k"),
    "negative top_k": ({"prompt": "a", "top_k": -1}, "top_k"),
    "min_p above 1": ({"prompt": "a", "min_p": 1.1}, "min_p"),
    "repetition_penalty of 0": ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    "presence_penalty above 2": ({"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
    "frequency_penalty below -2": ({"prompt": "a", "frequency_penalty": -3}, "frequency_penalty"),
    "huge seed": ({"prompt": "a", "seed": 2**63}, "seed"),
    "seed as text": ({"prompt": "a", "seed": "1"}, "seed"),
    "five stops": ({"prompt": "a", "stop": ["b"] * 5}, "stop"),
    "empty stop": ({"prompt": "a", "stop": ""}, "stop"),
    "empty stop in a list": ({"prompt": "a", "stop": ["b", ""]}, "stop"),
    "stop of a wrong type": ({"prompt": "a", "stop": 5}, "stop"),
    "stream as text": ({"prompt": "a", "stream": "yes"}, "stream"),
    "stream as a number": ({"prompt": "a", "stream": 1}, "stream"),
    "unknown field": ({"prompt": "a", "n": 2}, "n"),
    "no prompt": ({}, "prompt"),
    "empty prompt": ({"prompt": ""}, "prompt"),
    "null prompt": ({"prompt": None}, "prompt"),
    "prompt of a wrong type": ({"prompt": ["a"]}, "prompt"),
    "not an object": ([], None),
    "null": (None, None),
}


@pytest.mark.parametrize(("body", "param"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_field_is_422_and_named(
    unstarted: TestClient, body: Any, param: str | None
) -> None:
    """A field that is missing, unknown, of the wrong type or out of range is 422 and named."""
    check_error(post_bytes(unstarted, json.dumps(body).encode()), 422, "validation_error", param)


INVALID_CHATS = {
    "no messages": ({}, "messages"),
    "empty messages": ({"messages": []}, "messages"),
    "unknown role": ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
    "no role": ({"messages": [{"content": "a"}]}, "messages.0.role"),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0.content"),
    "empty content": ({"messages": [{"role": "user", "content": ""}]}, "messages.0.content"),
    "null content": ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    "unknown member": (
        {"messages": [{"role": "user", "content": "a", "name": "b"}]},
        "messages.0.name",
    ),
    "second fault": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": 1}]},
        "messages.1.content",
    ),
    "messages of a wrong type": ({"messages": "a"}, "messages"),
}


@pytest.mark.parametrize(("body", "param"), INVALID_CHATS.values(), ids=INVALID_CHATS.keys())
def test_an_invalid_chat_is_422_and_the_message_named(
    unstarted: TestClient, body: Any, param: str
) -> None:
    """An invalid chat is 422, with the path of the invalid field."""
    check_error(unstarted.post("/v1/chat", json=body), 422, "validation_error", param)


def test_a_late_system_message_is_refused(unstarted: TestClient) -> None:
    """Only the first message may be the system's; a later one is 422."""
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    response = unstarted.post("/v1/chat", json={"messages": messages})
    assert "system" in check_error(response, 422, "validation_error")["message"]


def test_the_input_is_never_echoed(unstarted: TestClient) -> None:
    """A validation error does not repeat the input, whatever its size."""
    bodies: list[Any] = [
        {"prompt": {"x": CANARY * 5000}},
        {"prompt": "a", "temperature": CANARY * 5000},
        {"prompt": "a", "stop": [CANARY * 5000]},
        {"prompt": "a", "stop": {CANARY: 1}},
        [CANARY * 5000],
        CANARY,
    ]
    for body in bodies:
        response = post_bytes(unstarted, json.dumps(body).encode())
        check_error(response, 422, "validation_error", response.json()["error"]["param"])
        assert CANARY not in response.text
        assert len(response.content) < 1000


def test_many_faults_make_a_short_answer(unstarted: TestClient) -> None:
    """The error for a body with thousands of faults names a few of them."""
    body = {"prompt": "a", **{f"field{i}": i for i in range(10_000)}}
    response = unstarted.post("/v1/generate", json=body)
    assert response.status_code == 422
    assert len(response.content) < 1000


def test_an_unknown_field_of_a_long_name_is_cut(unstarted: TestClient) -> None:
    """A long name of an unknown field is shortened in the error."""
    response = unstarted.post("/v1/generate", json={"prompt": "a", "x" * 100_000: 1})
    assert response.status_code == 422
    assert len(response.content) < 1000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/generate", {"prompt": CANARY * 9000}, "prompt"),
        ("/v1/chat", {"messages": [{"role": "user", "content": CANARY * 9000}]}, "messages"),
        ("/v1/chat", {"messages": [{"role": "user", "content": CANARY * 90}] * 100}, "messages"),
    ],
    ids=["prompt", "message", "messages"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_prompt_of_100_000_characters_is_422_without_echo(
    client: TestClient, path: str, body: dict[str, Any], param: str, stream: bool
) -> None:
    """More than max_prompt_chars characters, in one message or in all, are 422 without an echo."""
    response = client.post(path, json={**body, "stream": stream})
    check_error(response, 422, "prompt_too_long", param)
    assert CANARY not in response.text


def test_the_longest_prompt_is_accepted(client: TestClient) -> None:
    """Exactly max_prompt_chars characters are served; the limit counts characters, not bytes."""
    response = client.post("/v1/generate", json={"prompt": "é" * 4000, "max_tokens": 2})
    assert response.status_code == 200, response.text
    response = client.post("/v1/generate", json={"prompt": "é" * 4001, "max_tokens": 2})
    check_error(response, 422, "prompt_too_long", "prompt")


UNKNOWN_PATHS = [
    "/nothing",
    "/v1",
    "/v1/",
    "/v1/generate/x",
    "/V1/generate",
    "/%00",
    "/..%2f..%2fetc/passwd",
]


@pytest.mark.parametrize("path", UNKNOWN_PATHS)
def test_an_unknown_route_is_404(unstarted: TestClient, path: str) -> None:
    """An address that does not exist is 404 in the one shape, with or without a key."""
    check_error(unstarted.get(path), 404, "not_found")
    check_error(unstarted.get(path, headers={"X-API-Key": ""}), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/generate", "POST"),
        ("DELETE", "/v1/chat", "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("OPTIONS", "/v1/sessions/s", "GET, DELETE"),
        ("PUT", "/v1/models/a/b", "GET"),
        ("POST", "/docs", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_405(unstarted: TestClient, method: str, path: str, allowed: str) -> None:
    """A method that a path does not have is 405, and Allow lists those that it has."""
    response = unstarted.request(method, path)
    check_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == allowed


def test_an_unheard_of_method_is_405(unstarted: TestClient) -> None:
    """An unknown method is 405."""
    check_error(unstarted.request("BREW", "/v1/chat"), 405, "method_not_allowed")


def crashing_app() -> TestClient:
    """An application with two routes that crash."""
    app = create_app(make_settings())

    @app.get("/crash")
    async def crash() -> None:
        raise ZeroDivisionError(f"secret {CANARY} in /srv/app.py")

    @app.get("/group")
    async def group() -> None:
        raise ExceptionGroup("several", [RuntimeError(CANARY)])

    return TestClient(app)


@pytest.mark.parametrize("path", ["/crash", "/group"])
def test_a_crash_is_500_and_tells_nothing_internal(path: str) -> None:
    """An unexpected exception is 500 in the one shape, with the request id and no detail."""
    response = crashing_app().get(path)
    error = check_error(response, 500, "internal_error")
    assert error["type"] == "server_error"
    for secret in (CANARY, "Error", "app.py", "Traceback", "several"):
        assert secret not in response.text


def test_a_crash_is_logged_with_its_request_id(capfd: pytest.CaptureFixture[str]) -> None:
    """The traceback is in the log only, under the request id of the response."""
    crashing_app().get("/crash", headers={"X-Request-ID": "crash-1"})
    flush_log()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (line,) = [line for line in lines if line.get("exc_info")]
    assert line["request_id"] == "crash-1"
    assert "ZeroDivisionError" in line["exc_info"]


def test_a_loading_model_is_503_with_retry_after(unstarted: TestClient) -> None:
    """Until the model is loaded a valid request is 503 model_loading with Retry-After."""
    for path, body in (
        ("/v1/generate", {"prompt": "a"}),
        ("/v1/generate", {"prompt": "a", "stream": True}),
        ("/v1/chat", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        response = unstarted.post(path, json=body)
        check_error(response, 503, "model_loading")
        assert int(response.headers["retry-after"]) >= 1


# --- The body's size ------------------------------------------------------------------------------

LIMIT = 2048


@pytest.fixture(scope="module")
def small_bodies() -> TestClient:
    """An application that takes bodies of at most 2 KiB."""
    settings = make_settings(security={"max_body_bytes": LIMIT})
    return TestClient(create_app(settings), headers={"X-API-Key": API_KEY})


def test_a_body_over_the_limit_is_413(small_bodies: TestClient) -> None:
    """A body that announces more than the limit is refused with 413, and the connection ends."""
    response = post_bytes(small_bodies, b"x" * (LIMIT + 1))
    check_error(response, 413, "body_too_large")
    assert response.headers["connection"] == "close"


def test_a_body_of_exactly_the_limit_is_read(small_bodies: TestClient) -> None:
    """A body of exactly the limit is not refused for its size."""
    check_error(post_bytes(small_bodies, b"x" * LIMIT), 400, "invalid_json")


@pytest.mark.parametrize("announced", [{}, {"Content-Length": "10"}, {"Content-Length": "-5"}])
async def test_a_body_is_read_no_further_than_the_limit(announced: dict[str, str]) -> None:
    """Of an endless body at most the limit and one chunk are read, whatever it announces."""
    app = create_app(make_settings(security={"max_body_bytes": LIMIT}))
    scope = http_scope("POST", "/v1/generate", {"X-API-Key": API_KEY, **announced})
    received, sent = Received(b"x" * 1000, endless=True), Sent()
    await app(scope, received, sent)
    assert (sent.status, json.loads(sent.body)["error"]["code"]) == (413, "body_too_large")
    assert received.taken == 3


@pytest.mark.parametrize("length", ["99999999999999999999999999", "9" * 5000])
def test_an_absurd_content_length_is_413(small_bodies: TestClient, length: str) -> None:
    """A Content-Length of thousands of digits is 413."""
    response = small_bodies.post("/v1/generate", content=b"{}", headers={"Content-Length": length})
    check_error(response, 413, "body_too_large")
