"""The response cache in front of the engine: what it serves, and to whom."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
from starlette.testclient import TestClient

from tests.conftest import RunApp
from tests.support.live import FEW_TOKENS
from tests.support.service import OTHER_KEY, Service
from tests.support.sse import events, parse, piece_of


def new_prompt() -> dict[str, Any]:
    """A request nobody has made before."""
    return {"prompt": f"{uuid4()}", "max_tokens": 8, "temperature": 0}


def lookups(client: TestClient, result: str) -> float:
    """The number of look-ups with this result."""
    registry = client.app.state.services.metrics.registry  # type: ignore[attr-defined]
    value = registry.get_sample_value("response_cache_requests_total", {"result": result})
    return float(value or 0)


def test_the_second_identical_call_is_cached(client: TestClient) -> None:
    """A repeated request gets the same answer, marked as cached, under a new id."""
    body = new_prompt()
    hits = lookups(client, "hit")
    first, second = (client.post("/v1/generate", json=body).json() for _ in range(2))
    assert (first["cached"], second["cached"]) == (False, True)
    assert first["id"] != second["id"]
    for answer in (first, second):
        del answer["id"], answer["cached"]
    assert first == second
    assert lookups(client, "hit") == hits + 1


def test_a_stream_and_a_whole_answer_share_an_entry(client: TestClient) -> None:
    """A streamed answer is served whole later, and a whole one streamed, with the same usage."""
    for order in ((True, False), (False, True)):
        body = new_prompt()
        answers = []
        for stream in order:
            response = client.post("/v1/generate", json={**body, "stream": stream})
            if stream:
                streamed = parse(response.text, response.headers)  # type: ignore[arg-type]
                answers.append({**streamed.last, "generated_text": streamed.text})
            else:
                answers.append(response.json())
        assert [a["cached"] for a in answers] == [False, True]
        for member in ("generated_text", "usage", "tokens_generated", "finish_reason"):
            assert answers[0][member] == answers[1][member]


def test_another_key_does_not_share_an_answer(client: TestClient) -> None:
    """A caller never gets an answer that was generated for another key."""
    body = new_prompt()
    client.post("/v1/generate", json=body)
    other = client.post("/v1/generate", json=body, headers={"X-API-Key": OTHER_KEY})
    assert other.json()["cached"] is False


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 7},
        {"temperature": 0.5},
        {"seed": 1},
        {"stop": ["zzz"]},
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_any_difference_makes_another_answer(client: TestClient, change: dict[str, Any]) -> None:
    """Requests that differ in any field that changes the answer share no entry."""
    body = new_prompt()
    client.post("/v1/generate", json=body)
    assert client.post("/v1/generate", json={**body, **change}).json()["cached"] is False


def test_a_prompt_and_a_chat_are_kept_apart(client: TestClient) -> None:
    """The same words as a prompt and as a chat message share no entry."""
    prompt = new_prompt()
    message = {"role": "user", "content": prompt["prompt"]}
    client.post("/v1/generate", json=prompt)
    chat = {"messages": [message], "max_tokens": 8, "temperature": 0}
    assert client.post("/v1/chat", json=chat).json()["cached"] is False
    assert client.post("/v1/chat", json=chat).json()["cached"] is True
    with_system = [{"role": "system", "content": "x"}, message]
    response = client.post("/v1/chat", json={**chat, "messages": with_system})
    assert response.json()["cached"] is False


def test_cache_false_neither_reads_nor_writes(client: TestClient) -> None:
    """With cache: false the answer is generated again and not stored."""
    body = new_prompt()
    fresh = {**body, "cache": False}
    bypasses = lookups(client, "bypass")
    assert client.post("/v1/generate", json=fresh).json()["cached"] is False
    assert client.post("/v1/generate", json=body).json()["cached"] is False
    assert client.post("/v1/generate", json=fresh).json()["cached"] is False
    assert client.post("/v1/generate", json=body).json()["cached"] is True
    assert lookups(client, "bypass") == bypasses + 2


@pytest.mark.parametrize("header", ["no-cache", "No-Cache", "max-age=0, no-cache"])
def test_cache_control_no_cache_neither_reads_nor_writes(client: TestClient, header: str) -> None:
    """Cache-Control: no-cache has the effect of cache: false."""
    body = new_prompt()
    headers = {"Cache-Control": header}
    client.post("/v1/generate", json=body, headers=headers)
    assert client.post("/v1/generate", json=body).json()["cached"] is False
    assert client.post("/v1/generate", json=body, headers=headers).json()["cached"] is False


def test_a_failed_answer_is_not_kept(client: TestClient) -> None:
    """An error is not cached: the next request reaches the engine again."""
    body = {"prompt": f"[echo:fault] {uuid4()}"}
    misses = lookups(client, "miss")
    assert [client.post("/v1/generate", json=body).status_code for _ in range(2)] == [500, 500]
    assert lookups(client, "miss") == misses + 2


def test_a_cache_that_is_off_keeps_nothing(run_app: RunApp) -> None:
    """With cache.enabled false every request is generated."""
    client = run_app(cache={"enabled": False})
    body = new_prompt()
    for _ in range(2):
        assert client.post("/v1/generate", json=body).json()["cached"] is False


# --- Requests at the same time, over real sockets -------------------------------------------------


def test_50_identical_requests_run_the_engine_once(slow_service: Service) -> None:
    """Fifty identical requests at once share one generation, and all get its answer."""
    body = {"prompt": str(uuid4()), "max_tokens": 36}
    tokens = slow_service.metric("tokens_generated_total")
    with slow_service.client() as client, ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/generate", json=body), range(50)))
    assert {a.status_code for a in answers} == {200}
    assert {a.json()["generated_text"] for a in answers} == {body["prompt"]}
    assert slow_service.metric("tokens_generated_total") == tokens + 36
    assert slow_service.metric("response_cache_requests_total", result="miss") >= 1


def test_the_leaders_leaving_does_not_hurt_the_follower(slow_service: Service) -> None:
    """When the client that began a shared generation leaves, the others get the whole answer."""
    body = {"prompt": str(uuid4()), "stream": True}
    coalesced = slow_service.metric("response_cache_requests_total", result="coalesced")
    with (
        slow_service.client() as client,
        client.stream("POST", "/v1/generate", json=body) as leading,
        client.stream("POST", "/v1/generate", json=body) as following,
    ):
        # A generator that is garbage-collected closes its stream.
        beginning, rest = events(leading), events(following)
        next(beginning)
        next(rest)
        joined = slow_service.metric("response_cache_requests_total", result="coalesced")
        assert joined == coalesced + 1
        leading.close()
        assert "".join(piece_of(event) or "" for event in rest) == body["prompt"]
    slow_service.wait_for_metric("llm_requests_running", 0)


def test_the_last_ones_leaving_stops_a_shared_generation(slow_service: Service) -> None:
    """A shared generation is cancelled when its last client leaves."""
    body = {"prompt": str(uuid4()) * 14, "stream": True}
    cancelled = slow_service.metric("llm_requests_cancelled_total")
    with (
        slow_service.client() as client,
        client.stream("POST", "/v1/generate", json=body) as first,
        client.stream("POST", "/v1/generate", json=body) as second,
    ):
        readers = events(first), events(second)
        for reader in readers:
            next(reader)
        assert slow_service.metric("llm_requests_running") == 1
    # The whole answer has 500 tokens.
    tokens = slow_service.metric("tokens_generated_total")
    slow_service.wait_for_metric("llm_requests_running", 0)
    assert slow_service.metric("tokens_generated_total") - tokens < FEW_TOKENS
    assert slow_service.metric("llm_requests_cancelled_total") == cancelled + 1
