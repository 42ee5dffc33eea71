"""Two copies behind a real HAProxy, with a real Redis; `make test-replicas` restarts them often."""

import asyncio
import itertools
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
import yaml

from tests.support.balancer import load
from tests.support.live import generate
from tests.support.redis_server import redis_server
from tests.support.replicas import CONFIG, Replica, balanced, needs_haproxy
from tests.support.service import Service, open_client
from tests.support.sse import parse

pytestmark = needs_haproxy

CLIENTS = 8
STREAMS = 8
# Three seconds, so that all streams run when the copy is killed.
TEXT = "x" * 60


@pytest.fixture(scope="module")
def replicas() -> Iterator[list[Replica]]:
    """Two copies with the settings of deploy/compose.scale.yml and a Redis; tokens take time."""
    scale = yaml.safe_load((CONFIG.parents[1] / "compose.scale.yml").read_text(encoding="utf-8"))
    settings = scale["services"]["llm-service"]["environment"]
    with ExitStack() as stack:
        settings["STATE__URL"] = stack.enter_context(redis_server()).url
        running = []
        for _ in range(2):
            running.append(Replica(ENGINE__ECHO_STEP_SECONDS="0.05", **settings))
            stack.callback(running[-1].close)
        yield running


@pytest.fixture(scope="module")
def balancer(replicas: list[Replica]) -> Iterator[Service]:
    """HAProxy before the two."""
    with balanced(replicas) as running:
        yield running


class Straight:
    """Sends each request to HAProxy, once."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def post(self, body: dict[str, object]) -> httpx.Response:
        """The answer, whatever it is."""
        return await self._client.post("/v1/generate", json=body)

    async def probe(self) -> None:
        """HAProxy asks the copies itself."""


def answered(service: Service) -> int:
    """How many requests a copy has begun to answer since its start."""
    return int(service.metric("llm_time_to_first_token_seconds_count"))


def say(client: httpx.Client, session: str, text: str) -> None:
    """A turn of a session."""
    body = {"model": "default", "messages": [{"role": "user", "content": text}]}
    headers = {"X-Session-ID": session, "Connection": "close"}
    answer = client.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text


def history(client: httpx.Client, session: str) -> list[str]:
    """What was said in a session, as either copy knows it."""
    answer = client.get(f"/v1/sessions/{session}", headers={"Connection": "close"})
    return [message["content"] for message in answer.json()["messages"]]


def test_a_sessions_turns_go_to_one_copy(balancer: Service, replicas: list[Replica]) -> None:
    """Turns with the same X-Session-ID are answered by the same copy; all copies know them."""
    with balancer.client() as client:
        for number in range(3):
            before = [answered(replica.service) for replica in replicas]
            turns = [f"{number} {turn}" for turn in range(4)]
            for turn in turns:
                say(client, f"session-{number}", turn)
            after = [answered(replica.service) for replica in replicas]
            assert sorted(a - b for a, b in zip(after, before, strict=True)) == [0, len(turns)]
            for _ in replicas:
                assert history(client, f"session-{number}")[::2] == turns


def test_the_metrics_of_one_copy_are_no_answer(balancer: Service) -> None:
    """HAProxy shows nobody /metrics, which would be those of one copy or the other."""
    assert balancer.get("/metrics").status_code == 404


def test_a_request_that_kills_engines_kills_those_of_one_copy(
    balancer: Service, replicas: list[Replica]
) -> None:
    """What kills an engine twice is not tried on another copy."""
    name = "llm_engine_restarts_total"
    before = [replica.service.metric(name) for replica in replicas]
    with balancer.client() as client:
        answer = client.post("/v1/generate", json=generate("[echo:poison]"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")
        for replica in replicas:
            replica.service.wait_until_ready()
        after = [replica.service.metric(name) for replica in replicas]
        assert sorted(a - b for a, b in zip(after, before, strict=True)) == [0, 2]
        assert client.post("/v1/generate", json=generate("next")).status_code == 200


@pytest.mark.timeout(3600)
async def test_no_accepted_request_is_lost_when_both_copies_are_restarted(
    balancer: Service, replicas: list[Replica], pytestconfig: pytest.Config
) -> None:
    """Under load one copy after the other ends and starts again: answers and sessions are whole."""
    restarts: int = pytestconfig.getoption("--restarts")
    with balancer.client() as caller:
        say(caller, "restarted", "before")
    async with (
        open_client(balancer) as client,
        load(Straight(client), CLIENTS) as outcomes,
    ):
        for replica in itertools.islice(itertools.cycle(replicas), restarts):
            await asyncio.to_thread(replica.restart)
            while not await asyncio.to_thread(answered, replica.service):  # noqa: ASYNC110 - polls the copy
                await asyncio.sleep(0.2)
    assert set(outcomes) == {"whole"}, outcomes
    with balancer.client() as caller:
        say(caller, "restarted", "after")
        assert history(caller, "restarted")[::2] == ["before", "after"]


def test_a_killed_copy_costs_its_own_streams_alone(
    balancer: Service, replicas: list[Replica]
) -> None:
    """Streams of a copy that is killed break off; others, and all later requests, are whole."""
    killed, other = (replica.service for replica in replicas)
    with ThreadPoolExecutor(STREAMS) as pool, balancer.client() as client:

        def ask(text: str, *, stream: bool) -> str:
            try:
                answer = client.post("/v1/generate", json=generate(text, stream=stream))
            except httpx.TransportError:
                return ""
            assert answer.status_code == 200, answer.text
            return (
                parse(answer.text, answer.headers).text
                if stream
                else answer.json()["generated_text"]
            )

        streams = [pool.submit(ask, TEXT, stream=True) for _ in range(STREAMS)]
        running = "llm_requests_running"
        killed.wait_for(
            lambda: killed.metric(running) + other.metric(running) == STREAMS, "all streams"
        )
        lost = int(killed.metric(running))
        assert 0 < lost < STREAMS
        os.killpg(killed.process.pid, signal.SIGKILL)
        # What it was sent while it died is its own, too.
        killed.process.wait(10)
        assert [ask("again", stream=False) for _ in range(10)] == ["again"] * 10
        whole = [stream.result() for stream in streams].count(TEXT)
    assert whole == STREAMS - lost
