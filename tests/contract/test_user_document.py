"""The user's document: its commands, as written, give the answers that it shows.

The files and settings that it names are in test_user_files.py. The real model is asked for fewer
tokens than the commands say; `make test-full` asks for as many.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.curl import Answered, run_curl
from tests.support.fake_hub import running_hub
from tests.support.service import Service, running_service
from tests.support.tiny_model import make_tiny_model
from tests.support.user_commands import (
    CHAT,
    FIRST,
    FOLLOW_UP,
    GENERATE,
    HEALTH,
    METRICS,
    STATUS,
    STREAM,
)

MODEL = "google/gemma-2-2b-it"
TOKEN = "hf_token_of_a_reader"
FULL_SIZE = "FULL_SIZE" in os.environ

# The chat template of the document's model: it has no system role, and turns must alternate.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)

GENERATE_FIELDS = ["generated_text", "prompt", "model", "tokens_generated", "cached"]
CHAT_FIELDS = ["message", "model", "tokens_generated", "cached"]
ADDED_FIELDS = ["id", "finish_reason", "usage"]

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The service with the document's settings: the gated default model, and a token for it.

    The hub is a local one. The model has the default model's chat template and random weights.
    """
    folder = make_tiny_model(tmp_path_factory.mktemp("hub") / "model")
    (folder / "chat_template.jinja").write_text(GEMMA_TEMPLATE, encoding="utf-8")
    # Random weights generate bytes that are no characters, each of which takes three tokens in the
    # history.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 4096
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # With one token of 266 that ends an answer, most would have as many as they may.
    ends = {"eos_token_id": list(range(2, 8))}
    (folder / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    home = tmp_path_factory.mktemp("home")
    with running_hub() as hub:
        hub.add(MODEL, folder, gated=True)
        hub.tokens[TOKEN] = {MODEL}
        with running_service(
            MODEL__ENGINE="auto",
            HUGGINGFACE_TOKEN=TOKEN,
            RATE_LIMIT__ENABLED="true",
            HF_ENDPOINT=hub.url,
            HF_HOME=str(home),
            HF_HUB_DISABLE_XET="1",
            NO_PROXY="127.0.0.1,localhost",
            no_proxy="127.0.0.1,localhost",
        ) as running:
            yield running


@pytest.fixture(scope="module")
def answers(service: Service) -> dict[str, Answered]:
    """The answers to the document's commands, run in its order against a fresh service."""
    in_order = (HEALTH, STATUS, GENERATE, CHAT, FIRST, FOLLOW_UP, STREAM, METRICS)
    return {command: run_curl(service, command) for command in in_order}


def parsed(answered: Answered) -> dict[str, Any]:
    """The JSON object of an answer with status 200."""
    assert answered.status == 200, answered.body
    value: dict[str, Any] = json.loads(answered.body)
    return value


# --- API endpoints --------------------------------------------------------------------------------


def test_health_is_exactly_as_documented(answers: dict[str, Answered]) -> None:
    """GET /health answers with exactly the document's three members and values."""
    assert parsed(answers[HEALTH]) == {
        "status": "healthy",
        "model_loaded": True,
        "model_name": "google/gemma-2-2b-it",
    }


def test_status_has_cache_statistics(answers: dict[str, Answered]) -> None:
    """GET /status without a key shows the model, the engine and cache statistics."""
    status = parsed(answers[STATUS])
    assert {"entries", "hits", "misses"} <= status["cache"].keys()
    assert status["model"]["name"] == MODEL
    assert status["engine"]["backend"] == "transformers"
    assert status["engine"]["device"] == "cpu"


def test_generate_is_as_documented(answers: dict[str, Answered]) -> None:
    """POST /v1/generate answers with the document's members in its order, then ours."""
    answer = parsed(answers[GENERATE])
    assert list(answer) == GENERATE_FIELDS + ADDED_FIELDS
    assert isinstance(answer["generated_text"], str)
    assert answer["prompt"] == "Explain quantum computing in simple terms"
    assert answer["model"] == MODEL
    assert 1 <= answer["tokens_generated"] <= 200
    assert answer["cached"] is False


def test_chat_is_as_documented(answers: dict[str, Answered]) -> None:
    """POST /v1/chat answers with the document's members in its order, then ours."""
    answer = parsed(answers[CHAT])
    assert list(answer) == CHAT_FIELDS + ADDED_FIELDS
    assert list(answer["message"]) == ["role", "content"]
    assert answer["message"]["role"] == "assistant"
    assert answer["model"] == MODEL
    assert 1 <= answer["tokens_generated"] <= 100
    assert answer["cached"] is False


def test_a_session_goes_on(answers: dict[str, Answered]) -> None:
    """The prompt of a follow-up in a session includes the earlier turn."""
    first, follow_up = parsed(answers[FIRST]), parsed(answers[FOLLOW_UP])
    assert list(follow_up) == [*CHAT_FIELDS, "id", "session_id", "finish_reason", "usage"]
    assert follow_up["session_id"] == "user-123-conversation"
    # The longer question alone would add a dozen tokens.
    assert follow_up["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"] + 30


def test_a_stream_is_server_sent_events(answers: dict[str, Answered]) -> None:
    """The streaming command gives server-sent events and ends with [DONE]."""
    streamed = answers[STREAM]
    assert streamed.status == 200, streamed.body
    lines = [line for line in streamed.body.splitlines() if line]
    assert all(line.startswith(("data: ", ":")) for line in lines)
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    *pieces, last = map(json.loads, data[:-1])
    assert all(next(iter(event)) == "delta" for event in [*pieces, last])
    assert last["finish_reason"] in ("stop", "length")
    assert last["tokens_generated"] >= 1


def test_metrics_are_as_documented(answers: dict[str, Answered]) -> None:
    """GET /metrics has the document's three metrics with the document's labels."""
    assert answers[METRICS].status == 200
    page = answers[METRICS].body
    assert 'http_requests_total{endpoint="/v1/generate",method="POST",status="200"} 1.0' in page
    assert re.search(rf'^tokens_generated_total{{model="{MODEL}"}} [1-9]', page, re.MULTILINE)
    duration = (
        'http_request_duration_seconds_bucket{endpoint="/v1/generate",le="+Inf",method="POST"}'
    )
    assert f"{duration} 1.0" in page


def test_identical_prompts_are_cached(service: Service) -> None:
    """The same request again is answered from the cache, also at temperature 0.7."""
    first, second = (parsed(run_curl(service, GENERATE.replace("200", "20"))) for _ in range(2))
    assert (first["cached"], second["cached"]) == (False, True)
    assert second["generated_text"] == first["generated_text"]


# --- Observability and security -------------------------------------------------------------------


def test_the_log_line_is_as_documented(service: Service, answers: dict[str, Answered]) -> None:
    """A request's log line has the document's members and a request id."""
    assert answers
    line, *_ = service.lines(lambda entry: entry.get("route") == "/v1/generate")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", line.pop("timestamp"))
    assert line.pop("latency_ms") > 0
    assert line.pop("request_id")
    assert line == {
        "level": "INFO",
        "logger": "llm_service",
        "message": "POST /v1/generate - 200",
        "method": "POST",
        "route": "/v1/generate",
        "status_code": 200,
    }


def test_each_response_has_its_time(service: Service) -> None:
    """Every response has X-Process-Time, refusals included."""
    for path, status in {"/health": 200, "/metrics": 200, "/v1/chat": 405, "/none": 404}.items():
        response = service.get(path)
        assert response.status_code == status
        assert float(response.headers["x-process-time"]) > 0


@pytest.mark.parametrize("command", [GENERATE, CHAT, FIRST, STREAM], ids=lambda c: c[-40:-5])
def test_generation_needs_a_key(service: Service, command: str) -> None:
    """Every generating command is refused without a key and with a wrong one."""
    for header in ('-H "X-API-Key: wrong"', ""):
        refused = run_curl(service, command.replace('-H "X-API-Key: your-api-key-here"', header))
        assert refused.status == 401, refused.body
        assert json.loads(refused.body)["error"]["code"] == "invalid_api_key"


# --- A real model ---------------------------------------------------------------------------------


def chat(service: Service, question: str, **fields: Any) -> str:
    """The greedy answer to a question."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 40 if FULL_SIZE else 12,
        "temperature": 0,
        "cache": False,
        **fields,
    }
    with service.client(timeout=200) as client:
        response = client.post("/v1/chat", json=body)
    assert response.status_code == 200, response.text
    content: str = response.json()["message"]["content"]
    return content


@pytest.mark.model
def test_the_capital_of_france_is_paris(bundled_service: Service) -> None:
    """A real model gives the document's answer to its question."""
    assert "The capital of France is Paris." in chat(
        bundled_service, "What is the capital of France?"
    )


@pytest.mark.model
def test_the_follow_up_is_about_python(bundled_service: Service) -> None:
    """The follow-up "its main features" is about Python in the session and not outside of it."""
    session = {"session_id": "user-document"}
    assert "Python" in chat(bundled_service, "What is Python?", **session)
    assert "Python" in chat(bundled_service, "What are its main features?", **session)
    assert "Python" not in chat(bundled_service, "What are its main features?")


@pytest.mark.model
@pytest.mark.parametrize("command", [GENERATE, CHAT], ids=["generate", "chat"])
def test_the_commands_work_on_a_real_model(bundled_service: Service, command: str) -> None:
    """The document's commands give text from a real model, in the document's shape."""
    if not FULL_SIZE:
        command = re.sub(r'"max_tokens": \d+', '"max_tokens": 12', command)
    answer = parsed(run_curl(bundled_service, command, seconds=200))
    assert list(answer) in (GENERATE_FIELDS + ADDED_FIELDS, CHAT_FIELDS + ADDED_FIELDS)
    # A sampled answer may end after any token, so only the greedy one has a known length.
    assert answer["tokens_generated"] >= 1
    assert answer["model"] == "SmolLM2-135M-Instruct"
    assert '"temperature": 0.7' in command
    greedy = command.replace('"temperature": 0.7', '"temperature": 0.0').replace("200", "24")
    answer = parsed(run_curl(bundled_service, greedy, seconds=200))
    text = answer.get("generated_text") or answer["message"]["content"]
    assert len(text.split()) >= 3
