"""The log has the user's shape, one line an event, and no prompt, answer or key."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Body

from app.llm.engine.echo import LAST_WORDS
from app.main import create_app
from tests.conftest import flush_log, make_settings, restored_logging
from tests.support.service import API_KEY, OTHER_KEY, Service, running_service
from tests.support.sse import read_stream

CANARY = "canary-5b3e"


@pytest.fixture(scope="module")
def debug_service() -> Iterator[Service]:
    """A service at the level DEBUG, with a Hugging Face token."""
    with running_service(LOGGING__LEVEL="DEBUG", HUGGINGFACE_TOKEN=f"hf_{CANARY}") as service:
        yield service


@pytest.fixture(scope="module")
def text_log() -> list[str]:
    """The whole log of a service in the text format, after three probes and one request."""
    with running_service(LOGGING__FORMAT="text") as service:
        for path in ("/livez", "/health", "/metrics", "/nothing"):
            service.get(path)
        service.terminate()
        return service.raw_log().splitlines()


def access_line(service: Service, request_id: str) -> dict[str, Any]:
    """The access log's line of a request; it is written just after the answer has gone out."""
    (line,) = service.lines(lambda e: e.get("request_id") == request_id and "route" in e)
    return line


def test_a_request_is_logged_in_the_users_shape(debug_service: Service) -> None:
    """The line has the members of the user's document, in its order, and the request's id."""
    with debug_service.client() as client:
        body = {"prompt": "a", "max_tokens": 2}
        response = client.post("/v1/generate", json=body, headers={"X-Request-ID": "shape-1"})
    line = access_line(debug_service, "shape-1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    latency = line.pop("latency_ms")
    assert 0 < latency / 1000 < 60
    assert latency / 1000 >= float(response.headers["x-process-time"]) - 0.001
    assert line == {
        "level": "INFO",
        "logger": "llm_service",
        "message": "POST /v1/generate - 200",
        "request_id": "shape-1",
        "method": "POST",
        "route": "/v1/generate",
        "status_code": 200,
    }


def test_the_members_stand_in_the_documents_order(debug_service: Service) -> None:
    """timestamp, level, logger and message come first, so that people find them."""
    with debug_service.client() as client:
        client.get("/nothing")
    for event in debug_service.log():
        assert list(event)[:4] == ["timestamp", "level", "logger", "message"]


def test_every_line_is_one_json_object(debug_service: Service) -> None:
    """The service, its engine process and uvicorn write JSON lines only, without colour codes."""
    with debug_service.client() as client:
        client.get("/nothing")
    assert len(debug_service.log()) > 5
    loggers = {event["logger"] for event in debug_service.log()}
    assert {"uvicorn.error", "llm_service", "llm_service.engine"} <= loggers
    assert "\\u001b" not in debug_service.raw_log()


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("GET", "/nothing/secret", "GET unmatched - 404"),
        ("PUT", "/v1/chat", "PUT /v1/chat - 405"),
        ("POST", "/v1/chat", "POST /v1/chat - 401"),
    ],
)
def test_refusals_are_logged_too(
    debug_service: Service, method: str, path: str, message: str
) -> None:
    """An error has its line, with the template of the route and not the path."""
    request_id = f"refused-{method}-{message[-3:]}"
    with debug_service.client(key=None) as client:
        client.request(method, path, headers={"X-Request-ID": request_id})
    assert access_line(debug_service, request_id)["message"] == message


def test_probes_are_quiet(text_log: list[str]) -> None:
    """At the default level health probes and scrapes leave no line."""
    assert [line for line in text_log if "GET" in line] == [
        line for line in text_log if "GET unmatched" in line
    ]


def test_prompts_answers_and_keys_never_reach_the_log(debug_service: Service) -> None:
    """At the level DEBUG no content of a request is logged, whatever happens to the request."""
    with debug_service.client() as client:
        _provoke(client)
        # These end the engine process; the service lives on.
        for fault in ("raise", "crash"):
            response = client.post("/v1/generate", json={"prompt": f"[echo:{fault}]{CANARY}"})
            assert response.status_code == 500
            debug_service.wait_until_ready()
    log = debug_service.raw_log()
    assert "an engine step failed" in log
    for secret in (CANARY, API_KEY, OTHER_KEY):
        assert secret not in log
    # Every line is JSON, also the tracebacks.
    debug_service.log()


def _provoke(client: httpx.Client) -> None:
    """Requests with the canary in every place a caller can write to."""
    chat = {"messages": [{"role": "user", "content": CANARY}]}
    generate: dict[str, Any] = {"prompt": CANARY}
    assert CANARY in client.post("/v1/chat", json=chat).text
    assert CANARY in client.post("/v1/generate", json=generate).text
    assert CANARY in read_stream(client, "/v1/chat", chat).text
    assert client.post("/v1/generate", json={"prompt": f"[echo:fault]{CANARY}"}).status_code == 500
    for body in (
        {"prompt": [CANARY]},
        {**generate, CANARY: CANARY},
        {**generate, "stop": [CANARY] * 9},
        {**generate, "temperature": CANARY},
        {"prompt": CANARY * 1000},
    ):
        assert client.post("/v1/generate", json=body).status_code == 422
    assert client.post("/v1/generate", content=f'{{"{CANARY}": '.encode()).status_code == 400
    assert client.post("/v1/chat", content=CANARY.encode() * 200_000).status_code == 413
    for headers in (
        {"X-API-Key": CANARY},
        {"X-API-Key": "", "Authorization": f"Bearer {CANARY}"},
        {"X-API-Key": "", "Authorization": f"Basic {CANARY}"},
    ):
        assert client.post("/v1/chat", json=chat, headers=headers).status_code == 401
    for headers in (
        {"Idempotency-Key": CANARY},
        {"Idempotency-Key": CANARY * 50},
        {"X-Session-ID": CANARY},
        {"X-Request-Timeout": CANARY},
    ):
        client.post("/v1/generate", json=generate, headers=headers)
    completion = {"model": "echo", **chat, "user": CANARY}
    for path, body in (
        ("/v1/chat/completions", completion),
        ("/v1/chat/completions", {**completion, "stream": True}),
        ("/v1/completions", {"model": "echo", "prompt": CANARY}),
        ("/v1/tokenize", {"text": CANARY}),
    ):
        assert client.post(path, json=body, headers={"X-Session-ID": CANARY}).status_code == 200
    function = {"name": CANARY, "parameters": {"type": CANARY}}
    schema = {"name": CANARY, "schema": {"type": "object", CANARY: CANARY}}
    for odd in (
        {"tools": [{"type": "function", "function": function}], "tool_choice": "required"},
        {"response_format": {"type": "json_schema", "json_schema": schema}},
        {"model": CANARY},
        {"stop": CANARY, "logit_bias": {CANARY: 1}},
        {"messages": [{"role": CANARY, "content": [{"type": CANARY}]}]},
    ):
        assert client.post("/v1/chat/completions", json={**completion, **odd}).status_code >= 400
    session = {**chat, "session_id": CANARY}
    assert client.post("/v1/chat", json=session).status_code == 200
    for method in ("GET", "DELETE", "DELETE"):
        client.request(method, f"/v1/sessions/{CANARY}")
    headers = {"User-Agent": CANARY, "Cookie": CANARY, "X-Request-ID": f'"{CANARY}"'}
    assert client.get(f"/{CANARY}?q={CANARY}", headers=headers).status_code == 404


@pytest.mark.parametrize("log_format", ["json", "text"])
async def test_a_fault_of_the_service_does_not_show_what_it_stumbled_over(
    log_format: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """An exception that repeats the prompt is logged with its traceback, and without the prompt."""
    with restored_logging():
        app = create_app(make_settings(logging={"level": "DEBUG", "format": log_format}))

        @app.post("/stumble")
        async def stumble(body: Annotated[dict[str, Any], Body()]) -> None:
            try:
                raise KeyError(body["prompt"])
            except KeyError as error:
                raise ValueError(f"cannot do {body}") from error

        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            response = await client.post("/stumble", json={"prompt": CANARY})
        await asyncio.to_thread(flush_log)
    assert (response.status_code, CANARY in response.text) == (500, False)
    written = capfd.readouterr().err
    for part in ("unhandled exception", "builtins.KeyError", "builtins.ValueError", "in stumble"):
        assert part in written
    assert CANARY not in written


def test_nobody_can_forge_a_line(debug_service: Service) -> None:
    """Line breaks in what a caller sends never begin a line of the log."""
    forged = '\n{"level":"CRITICAL","message":"forged"}\r\n'
    with debug_service.client() as client:
        client.post("/v1/generate", json={"prompt": forged, forged: 1})
        client.get("/x%0a%7B%22message%22%3A%22forged%22%7D")
        client.post("/v1/generate", json={"prompt": "[echo:fault]" + forged})
    assert "forged" not in debug_service.raw_log()


def test_what_libraries_write_becomes_events(debug_service: Service) -> None:
    """Each line that native code writes to standard error of the engine becomes a JSON line."""
    with debug_service.client() as client:
        client.post("/v1/generate", json={"prompt": "[echo:crash]", "cache": False})
    debug_service.wait_until_ready()
    events = [(e["level"], e["message"].partition(" (")[0]) for e in debug_service.log()]
    crash = events.index(("WARNING", f"the engine process wrote: {LAST_WORDS}"))
    assert events[crash + 1] == events[crash]
    # They come before the line about the end of the process, which they explain.
    assert ("ERROR", "the engine process ended: signal SIGSEGV") in events[crash:]


def test_the_text_format_is_for_people(text_log: list[str]) -> None:
    """With logging.format text each line has time, level, logger and message, and no JSON."""
    line = next(line for line in text_log if "unmatched" in line)
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d INFO    llm_service: GET unmatched - 404 \[req-[0-9a-f]{32}\]", line
    )
    for line in text_log:
        with pytest.raises(json.JSONDecodeError):
            json.loads(line)


def test_the_start_ends_with_what_is_served(echo_service: Service) -> None:
    """The line of a start's end names the model, its engine, threads, memory and context."""
    (line,) = echo_service.lines(lambda e: e["message"].startswith("ready for"))
    assert re.fullmatch(
        r"ready for requests: echo on echo \(cpu, \w+, \d+ threads\), \d+ MB of memory, "
        r"a context of [\d,]+ tokens",
        line["message"],
    )
