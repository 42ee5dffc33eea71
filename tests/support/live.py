"""What tests of a running service share: slow answers, streams to leave, requests on the side."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx

from tests.support.service import Service
from tests.support.sse import events, piece_of

# Seconds that the echo engine of the slow services takes for a token.
STEP = 0.05
# 400 tokens, which take 20 seconds.
LONG = "x" * 400
LONG_SECONDS = len(LONG) * STEP
# A tenth of that: what is over by then did not simply finish.
SOON = LONG_SECONDS / 10


def generate(prompt: str, **fields: Any) -> dict[str, Any]:
    """A request of its own, never shared with another."""
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


def rest_of(found: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is left of a stream that must end in order, with ``[DONE]``."""
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
