"""A service with vLLM, on a CPU: what its callers get, and how it bears faults (make test-vllm)."""

import json
import os
import re
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from jsonschema import validate
from openai import OpenAI

from benchmarks.peers import bundled_safetensors
from tests.api.test_openai_tools import WEATHER
from tests.support.backends import need_vllm
from tests.support.curl import run_curl
from tests.support.live import ask, generate, open_stream, rest_of
from tests.support.service import API_KEY, Service, running_service
from tests.support.user_commands import CHAT, GENERATE

pytestmark = [pytest.mark.vllm, pytest.mark.model, pytest.mark.timeout(900)]

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
# A greedy answer goes on counting.
COUNT = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,"
LONG = generate(COUNT, max_tokens=2000, temperature=0)
SHORT = generate(COUNT, max_tokens=60, temperature=0)
STALL_SECONDS = 5


def settings(**more: str) -> dict[str, str]:
    """The bundled model's weights, on vLLM."""
    need_vllm()
    return {
        "MODEL__ENGINE": "vllm",
        "MODEL__SOURCE": "local",
        "MODEL__NAME": str(bundled_safetensors()),
        "MODEL__MAX_TOKENS": "2000",
        "ENGINE__STALL_TIMEOUT_SECONDS": str(STALL_SECONDS),
        **more,
    }


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """A service that the tests share; the last ones replace its engine."""
    with running_service(**settings()) as running:
        yield running


@pytest.fixture
def sdk(service: Service) -> Iterator[OpenAI]:
    """The official client."""
    http = openai.DefaultHttpxClient(trust_env=False, timeout=120)
    with OpenAI(
        base_url=f"{service.base_url}/v1", api_key=API_KEY, http_client=http, max_retries=0
    ) as client:
        yield client


def test_status_says_why(service: Service) -> None:
    """The engine and the reason for it are in /status, and what vLLM said of loading in the log."""
    engine = service.get("/status").json()["engine"]
    assert (engine["backend"], engine["backend_reason"]) == ("vllm", "model.engine is vllm")
    assert service.lines(lambda e: e["message"].startswith("vLLM: "))


def test_the_users_commands(service: Service) -> None:
    """The user's curl commands are answered."""
    for command, member in ((GENERATE, "generated_text"), (CHAT, "message")):
        answered = run_curl(service, command, seconds=200)
        assert answered.status == 200, answered.body
        assert json.loads(answered.body)[member]


def test_stream(sdk: OpenAI) -> None:
    """An OpenAI client reads a greedy answer in pieces."""
    with sdk.chat.completions.create(
        model="default", messages=QUESTION, temperature=0, stream=True
    ) as stream:
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == ANSWER
    assert len(pieces) > 4


def test_a_schema(sdk: OpenAI) -> None:
    """An answer is JSON of its schema."""
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "size": {"enum": ["s", "l"]}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }
    answered = sdk.chat.completions.create(
        model="default",
        messages=QUESTION,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": schema}},
    )
    validate(json.loads(answered.choices[0].message.content or ""), schema)


def test_forced_tools(sdk: OpenAI) -> None:
    """A forced call has arguments of the tool's schema."""
    tools: Any = [WEATHER]
    answered = sdk.chat.completions.create(
        model="default",
        messages=QUESTION,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
    )
    (call,) = answered.choices[0].message.tool_calls or []
    assert call.type == "function"
    validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])  # type: ignore[index]


def test_logprobs(sdk: OpenAI) -> None:
    """Each token has its log-probability and the likeliest ones, and the engine lives on."""
    answered = sdk.chat.completions.create(
        model="default", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3
    )
    found = answered.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert "".join(token.token for token in found.content) == ANSWER
    for token in found.content:
        assert token.top_logprobs[0].token == token.token
        assert len(token.top_logprobs) == 3


def test_a_session_finds_its_prefix(service: Service) -> None:
    """A session's second prompt finds the first turn in the KV cache."""
    with service.client() as client:
        for text, least in (("What is the capital of France?", 0), ("And of Italy?", 1)):
            body = {"messages": [{"role": "user", "content": text}], "session_id": "s"}
            usage = client.post("/v1/chat", json=body).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] >= least


def test_a_schema_beyond_vllms_own_is_held(sdk: OpenAI) -> None:
    """A format and a length beside a pattern, which vLLM's own translation refuses, are held."""
    texts = {"code": {"type": "string", "pattern": "^[A-Z]{3}$", "minLength": 2}}
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {**texts, "data": {"type": "string", "format": "byte"}},
        "required": ["code"],
        "additionalProperties": False,
    }
    answered = sdk.chat.completions.create(
        model="default",
        messages=QUESTION,
        max_tokens=400,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "c", "schema": schema, "strict": True},
        },
    )
    text = answered.choices[0].message.content or ""
    assert re.match(r'{"code": ?"[A-Z]{3}"[,}]', text)
    # The data may be longer than the answer.
    if answered.choices[0].finish_reason == "stop":
        validate(json.loads(text), schema)


def test_a_refused_schema_fails_alone(service: Service) -> None:
    """A request whose schema is refused gets a 400, while another one goes on."""
    restarts = service.metric("llm_engine_restarts_total")
    deep: dict[str, Any] = {"type": "null"}
    for _ in range(70):
        deep = {"type": "array", "items": deep}
    form = {"name": "deep", "schema": deep, "strict": True}
    asked = {"type": "json_schema", "json_schema": form}
    with open_stream(service, SHORT) as found:
        with service.client() as client:
            body = {"model": "default", "messages": QUESTION, "response_format": asked}
            assert client.post("/v1/chat/completions", json=body).status_code == 400
        assert rest_of(found)[-1]["finish_reason"] in ("stop", "length")
    assert service.metric("llm_engine_restarts_total") == restarts


def test_leaving_frees_the_slot(service: Service) -> None:
    """An answer ends when its reader leaves."""
    before = service.metric("tokens_generated_total")
    with open_stream(service, LONG):
        pass
    service.wait_for_metric("llm_requests_running", 0)
    assert service.metric("tokens_generated_total") - before < 200


def lives_on(service: Service, restarts: float) -> None:
    """The engine has been replaced, and answers."""
    service.wait_until_ready()
    assert service.metric("llm_engine_restarts_total") == restarts + 1
    assert ask(service, generate("Hello", max_tokens=5)).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
def test_a_lost_engine_is_replaced(service: Service, number: int) -> None:
    """Killed, stopped or crashed in an answer, it is replaced; the stream ends with an error."""
    restarts = service.metric("llm_engine_restarts_total")
    with open_stream(service, LONG) as found:
        os.kill(service.engine_pid, number)
        assert rest_of(found)[-1]["error"]["code"] == "engine_failed"
    lives_on(service, restarts)


def test_an_engine_without_memory_is_replaced(service: Service) -> None:
    """An engine that cannot allocate in a step dies and is replaced."""
    restarts = service.metric("llm_engine_restarts_total")
    pid = service.engine_pid
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size, size))
    with ThreadPoolExecutor(32) as pool:
        bodies = [generate("a b c " * 600 + str(i), max_tokens=10) for i in range(32)]
        answers = list(pool.map(lambda body: ask(service, body), bodies))
    assert {answer.status_code for answer in answers} <= {200, 500, 503}
    lives_on(service, restarts)


def test_sigterm_lets_a_stream_finish(service: Service) -> None:
    """After SIGTERM a stream is finished, and the service ends with status 0 and leaves nothing."""
    with open_stream(service, SHORT) as found:
        service.process.terminate()
        assert rest_of(found)[-1]["finish_reason"] in ("stop", "length")
    assert service.wait() == 0
    assert service.survivors() == []


def test_helpers_and_the_engine_share_their_end() -> None:
    """The engine fails in a step that a helper leaves; a stopped helper outlives no engine."""
    arguments = json.dumps({"distributed_executor_backend": "mp"})
    with running_service(until="listening", **settings(ENGINE__VLLM_ARGS=arguments)) as service:
        service.wait_for(lambda: "vLLM: " in str(loading(service)), "vLLM's progress in /status")
        service.wait_until_ready()
        with open_stream(service, LONG) as found:
            os.kill(helpers(service)[0], signal.SIGKILL)
            assert rest_of(found)[-1]["error"]["code"] == "engine_failed"
        lives_on(service, 0)
        stopped = helpers(service)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        os.kill(service.engine_pid, signal.SIGKILL)
        service.wait_for(lambda: not any(map(command, stopped)), "the helpers' end")
        service.wait_for_metric("llm_engine_restarts_total", 2)
        lives_on(service, 1)
        for pid in helpers(service):
            os.kill(pid, signal.SIGSTOP)
        # The block's end waits for the end of all of its processes.
        service.process.kill()
        service.process.wait(30)


def loading(service: Service) -> str | None:
    """What /status says of loading."""
    said: str | None = service.get("/status").json()["engine"]["message"]
    return said


def helpers(service: Service) -> list[int]:
    """The engine's helper processes that compute."""
    engine = service.engine_pid
    found = [pid for pid in children(engine) if b"resource_tracker" not in command(pid)]
    assert found
    return found


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def command(pid: int) -> bytes:
    """A process's command; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
