"""What HTTP clients and proxies do in practice: HTTP/1.0, slashes, browsers, packed bodies."""

import gzip
import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.conftest import RunApp
from tests.support.openai import CHAT, chat, refused, user
from tests.support.raw import KEY, RawClient, post
from tests.support.service import API_KEY, Service
from tests.support.sse import data_lines

BODY = json.dumps({"prompt": "hello", "cache": False}).encode()
ORIGIN = "https://app.example.com"


def http_1_0(body: dict[str, Any], *headers: str) -> bytes:
    """A request over HTTP/1.0 that wants the connection to stay."""
    content = json.dumps({"model": "echo", "messages": user("hello"), **body}).encode()
    length = f"Content-Length: {len(content)}"
    sent = post(KEY, "Connection: keep-alive", length, *headers, path=CHAT)
    return sent.replace(b"HTTP/1.1", b"HTTP/1.0", 1) + content


# --- HTTP/1.0 -------------------------------------------------------------------------------------


def test_a_stream_over_http_1_0_has_no_chunks(echo_service: Service) -> None:
    """Over HTTP/1.0 a stream is its events alone, and ends with the connection."""
    # "100 Continue" would be the whole answer to a client that does not know it.
    for further in ((), ("Expect: 100-continue",)):
        with RawClient(echo_service) as client:
            client.send(http_1_0({"stream": True}, *further))
            status, headers = client.head()
            lines = client.rest().decode().splitlines()
        assert status == 200
        assert "transfer-encoding" not in headers
        assert headers["connection"] == "close"
        assert all(not line or line.startswith("data: ") for line in lines)
        assert list(data_lines(lines))[-1] == "[DONE]"


def test_a_whole_answer_over_http_1_0_has_a_length(echo_service: Service) -> None:
    """Over HTTP/1.0 a whole answer has its length, and an error has too."""
    for body, expected in (({}, 200), ({"n": 0}, 400)):
        with RawClient(echo_service) as client:
            answer = client.ask(http_1_0(body))
            assert (answer.status, client.rest()) == (expected, b"")
            assert json.loads(answer.body)


# --- Addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/models/default/", "/health/", "/health//"])
def test_a_trailing_slash_is_answered(client: TestClient, path: str) -> None:
    """An address with a slash at its end is answered as the one without, not redirected."""
    slashed = client.get(path, follow_redirects=False)
    assert slashed.status_code == 200
    assert slashed.json() == client.get(path.rstrip("/")).json()


def test_a_trailing_slash_of_a_post_and_of_nothing(client: TestClient) -> None:
    """A body is read behind a slash, and what is not there stays 404 in the one shape."""
    answer = client.post(f"{CHAT}/", json={"model": "echo", "messages": user("hello")})
    assert answer.json()["choices"][0]["message"]["content"] == "hello"
    assert refused(client.get("/nothing/", follow_redirects=False))[:2] == (404, "not_found")


# --- Browsers -------------------------------------------------------------------------------------

PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
}


def test_browsers_are_not_served_by_default(client: TestClient) -> None:
    """Without security.cors_origins no page of another origin can read an answer."""
    assert refused(client.options(CHAT, headers=PREFLIGHT))[0] == 405
    answer = chat(client, headers={"Origin": ORIGIN})
    assert "access-control-allow-origin" not in answer.headers


def test_a_page_of_a_listed_origin_is_served(run_app: RunApp) -> None:
    """A listed origin's preflight is answered without a key; it reads answers and errors."""
    client = run_app(security={"cors_origins": [ORIGIN, "tauri://localhost"]})
    del client.headers["X-API-Key"]
    preflight = client.options(CHAT, headers=PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
    allowed = preflight.headers["access-control-allow-headers"].lower()
    assert all(name in allowed for name in ("authorization", "x-stainless-lang"))
    assert "x-request-id" in preflight.headers
    key = {"Authorization": f"Bearer {API_KEY}"}
    for headers, status in ((key, 200), ({}, 401)):
        answer = chat(client, headers={"Origin": ORIGIN, **headers})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["access-control-expose-headers"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


def test_a_page_of_another_origin_is_not_served(run_app: RunApp) -> None:
    """An origin that is not listed gets no permission, only an error; with * every origin does."""
    other = {"Origin": "https://evil.example"}
    client = run_app(security={"cors_origins": [ORIGIN]})
    preflight = client.options(CHAT, headers={**PREFLIGHT, **other})
    assert refused(preflight) == (400, "invalid_request", None)
    assert "access-control-allow-origin" not in preflight.headers
    assert "access-control-allow-origin" not in chat(client, headers=other).headers
    anyone = run_app(security={"cors_origins": ["*"]})
    assert chat(anyone, headers=other).headers["access-control-allow-origin"] == "*"


# --- Bodies ---------------------------------------------------------------------------------------


def send(client: TestClient, content: bytes, **headers: str) -> Any:
    """Post a body as bytes."""
    return client.post("/v1/generate", content=content, headers=headers)


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
def test_a_gzip_body_is_read(client: TestClient, encoding: str) -> None:
    """A body that is packed with gzip is read; one with a byte order mark is too."""
    packed = send(client, gzip.compress(BODY), **{"Content-Encoding": encoding})
    assert packed.json()["generated_text"] == "hello"
    assert send(client, b"\xef\xbb\xbf" + BODY).json()["generated_text"] == "hello"
    assert send(client, BODY, **{"Content-Encoding": "identity"}).status_code == 200


def test_a_gzip_body_is_bounded(client: TestClient) -> None:
    """A small body that unpacks to more than the limit is 413."""
    bomb = gzip.compress(b" " * (1_048_576 + 1 - len(BODY)) + BODY)
    assert len(bomb) < 4096
    answer = send(client, bomb, **{"Content-Encoding": "gzip"})
    assert refused(answer)[:2] == (413, "body_too_large")


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (BODY, "gzip"),
        (gzip.compress(BODY)[:-9], "gzip"),
        (gzip.compress(BODY) * 2, "gzip"),
        (b"", "gzip"),
        (BODY, "br"),
    ],
    ids=["not packed", "broken off", "two parts", "empty", "another encoding"],
)
def test_a_body_that_cannot_be_unpacked_is_refused(
    client: TestClient, body: bytes, encoding: str
) -> None:
    """A body that is not what its Content-Encoding says is 400, and the message says so."""
    answer = send(client, body, **{"Content-Encoding": encoding})
    assert refused(answer)[:2] == (400, "invalid_json")
    assert "gzip" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b'{"prompt": secret}', "line 1 column 12"),
        (b'{\n "prompt": "a",\n}', "line 3 column 1"),
        (b'{"prompt": "secret', "line 1 column 18"),
        (b"prompt=secret", "line 1 column 1"),
        (b"", "line 1 column 0"),
    ],
)
def test_what_is_not_json_says_where(client: TestClient, body: bytes, where: str) -> None:
    """The message of invalid_json has the place of the fault, and nothing of the body."""
    answer = send(client, body)
    assert refused(answer)[:2] == (400, "invalid_json")
    message = answer.json()["error"]["message"]
    assert where in message
    assert "secret" not in message
