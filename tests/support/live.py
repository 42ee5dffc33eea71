"""Helpers for tests of a running service: slow answers, streams, requests in the background."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.raw import RawClient, generate_request
from tests.support.service import Service
from tests.support.sse import events, piece_of

# Seconds that the echo engine of the slow services takes for a token.
STEP = 0.05
# 400 tokens, which take 20 seconds.
LONG = "x" * 400
LONG_SECONDS = len(LONG) * STEP
# A tenth of that: an answer that is over by then was cut short.
SOON = LONG_SECONDS / 10
# One or two tokens are usual between a client's leaving and the end of its answer.
FEW_TOKENS = len(LONG) // 10

Gauges = dict[str, float]
PLACES = ("llm_requests_running", "llm_requests_waiting")
FIRST_TOKENS = "llm_time_to_first_token_seconds_count"


def generate(prompt: str, **fields: Any) -> dict[str, Any]:
    """A request that is never answered from the cache."""
    return {"prompt": prompt, "cache": False, **fields}


@contextmanager
def open_stream(
    service: Service, body: dict[str, Any], **kwargs: Any
) -> Iterator[Iterator[dict[str, Any]]]:
    """A stream whose first piece of text has come; leaving the block leaves the stream."""
    with (
        service.client(**kwargs) as client,
        client.stream("POST", "/v1/generate", json={**body, "stream": True}) as response,
    ):
        assert response.status_code == 200, response.read()
        found = events(response)
        while piece_of(next(found)) is None:
            pass
        yield found


def tokens_until_free(
    service: Service, body: dict[str, Any], in_phase: Callable[[Gauges, Gauges], bool]
) -> float:
    """Tokens that the engine generates from when a client has left until its place is free.

    Args:
        service: It has no other requests, except those that keep this one waiting.
        body: The body of the request.
        in_phase: Whether the client leaves now, by the metrics before the request and now.
    """
    with service.client() as watcher:
        before = gauges(watcher)
        with RawClient(service) as client:
            client.send(generate_request(body))
            while not in_phase(before, gauges(watcher)):
                time.sleep(0.001)
        generated = service.metric("tokens_generated_total")
        for place in PLACES:
            service.wait_for_metric(place, before[place])
        return service.metric("tokens_generated_total") - generated


def gauges(client: httpx.Client) -> Gauges:
    """The metrics that have no labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {s.name: s.value for family in families for s in family.samples if not s.labels}


def rest_of(found: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rest of a stream, up to ``[DONE]``."""
    return list(found)


@contextmanager
def background(function: Callable[..., Any], *args: Any) -> Iterator[Future[Any]]:
    """Runs ``function`` on a thread for as long as the block, and waits for it at the end."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(function, *args)


def ask(service: Service, body: dict[str, Any]) -> httpx.Response:
    """A whole answer, on a connection of its own."""
    with service.client() as client:
        return client.post("/v1/generate", json=body)
