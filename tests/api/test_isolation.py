"""Two keys that use the same names for everything do not affect each other.

A model of each caller knows what the caller would see alone: its sessions, its cached and repeated
answers, its usage. Both callers act at the same time, often with the same request, and every answer
must match the model. `make test-isolation` does 100,000 operations.
"""

import asyncio
import contextlib
import os
import random
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.support.application import KEY, OTHER, Client, start
from tests.support.sse import parse

OPERATIONS = int(os.environ.get("ISOLATION_OPERATIONS", "300"))
SEED = int(os.environ.get("ISOLATION_SEED", "7"))

SESSIONS = ("home", "work", "s")
PROMPTS = ("one", "two", "three")
MAX_MESSAGES = 4
# Steps after which idempotent requests get new keys.
KEYS_LAST = 25


@dataclass(frozen=True)
class Operation:
    """One request, not yet of a caller."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    idempotency_key: str = ""


def draw(chance: random.Random, step: int) -> Operation:
    """A random operation, on names that both callers use."""
    session = chance.choice(SESSIONS)
    text = chance.choice(PROMPTS)
    kind = chance.choices(
        ["generate", "chat", "turn", "read", "forget", "usage"], [4, 3, 6, 4, 1, 1]
    )[0]
    if kind in ("read", "forget"):
        return Operation("GET" if kind == "read" else "DELETE", f"/v1/sessions/{session}")
    if kind == "usage":
        return Operation("GET", "/v1/usage")
    body: dict[str, Any] = {"stream": chance.random() < 0.3}
    if kind == "generate":
        body["prompt"] = text
    else:
        body["messages"] = [{"role": "user", "content": text}]
    if kind == "turn":
        body["session_id"] = session
    key = f"{step // KEYS_LAST}-{chance.randrange(4)}" if chance.random() < 0.4 else ""
    return Operation("POST", "/v1/generate" if kind == "generate" else "/v1/chat", body, key)


@dataclass
class Caller:
    """A key, and the model of what its owner must see.

    Attributes:
        kept: By idempotency key, the request and the bytes of its answer.
        known: Requests whose answers are in the response cache.
        own_ids: Ids of all of its answers.
    """

    name: str
    http: httpx.AsyncClient
    headers: dict[str, str]
    sessions: dict[str, list[str]] = field(default_factory=dict)
    kept: dict[str, tuple[Operation, bytes]] = field(default_factory=dict)
    known: set[Any] = field(default_factory=set)
    own_ids: set[str] = field(default_factory=set)
    requests: int = 0
    tokens: int = 0

    async def do(self, operation: Operation) -> None:
        """Send a request and check its answer against the model."""
        headers = dict(self.headers)
        if operation.idempotency_key:
            headers["Idempotency-Key"] = operation.idempotency_key
        response = await self.http.request(
            operation.method, operation.path, json=operation.body, headers=headers
        )
        if operation.path == "/v1/usage":
            self._check_usage(response)
        elif operation.method == "GET":
            self._check_history(operation.path.rpartition("/")[2], response)
        elif operation.method == "DELETE":
            gone = self.sessions.pop(operation.path.rpartition("/")[2], None)
            assert response.status_code == (404 if gone is None else 204)
        else:
            self._check_post(operation, response)

    def _check_usage(self, response: httpx.Response) -> None:
        shown = {key["name"]: key for key in response.json()["keys"]}
        # The first key has the scope admin.
        assert set(shown) == ({"bob"} if self.name == "bob" else {"default", "bob"})
        total = shown[self.name]["total"]
        assert (total["requests"], total["total_tokens"]) == (self.requests, self.tokens)

    def _check_history(self, session: str, response: httpx.Response) -> None:
        said = self.sessions.get(session)
        assert response.status_code == (404 if said is None else 200)
        if said is not None:
            assert [m["content"] for m in response.json()["messages"]] == said

    def _check_post(self, operation: Operation, response: httpx.Response) -> None:
        assert operation.body is not None
        key = operation.idempotency_key
        if key in self.kept:
            first, content = self.kept[key]
            if first == operation:
                assert response.headers["idempotency-replayed"] == "true"
                assert response.content == content
            else:
                assert response.json()["error"]["code"] == "idempotency_key_reused"
            return
        assert response.status_code == 200, response.text
        assert "idempotency-replayed" not in response.headers
        self._check_answer(operation.body, response)
        if key:
            self.kept[key] = (operation, response.content)

    def _check_answer(self, body: dict[str, Any], response: httpx.Response) -> None:
        if body["stream"]:
            streamed = parse(response.text, response.headers)
            answer, text = streamed.last, streamed.text
        else:
            answer = response.json()
            text = answer.get("generated_text") or answer["message"]["content"]
        history: list[str] = []
        asked = body.get("prompt")
        if asked is None:
            asked = body["messages"][0]["content"]
            history = self.sessions.get(body.get("session_id", ""), [])
        assert text == asked
        request = ("prompt" in body, *history, asked)
        assert answer["cached"] is (request in self.known)
        assert answer["id"] not in self.own_ids
        self.own_ids.add(answer["id"])
        self.requests += 1
        if not answer["cached"]:
            self.tokens += answer["usage"]["total_tokens"]
        self.known.add(request)
        if "session_id" in body:
            self.sessions[body["session_id"]] = [*history, asked, text][-MAX_MESSAGES:]


def callers(client: Client) -> tuple[Caller, Caller]:
    """The callers of both keys, on one application."""
    return (
        Caller("default", client.http, {"X-API-Key": KEY}),
        Caller("bob", client.http, {"X-API-Key": OTHER}),
    )


@pytest.mark.no_cover
async def test_two_keys_never_see_each_others_anything() -> None:
    """Each of two keys that use the same names at the same time sees what it would see alone."""
    chance = random.Random(SEED)
    async with start(
        chat_history={"max_messages": MAX_MESSAGES}, logging={"level": "ERROR"}
    ) as client:
        alice, bob = callers(client)
        for step in range(OPERATIONS // 2):
            first = draw(chance, step)
            # Every second time both send the same request.
            second = first if chance.random() < 0.5 else draw(chance, step)
            try:
                await asyncio.gather(alice.do(first), bob.do(second))
            except AssertionError as error:
                error.add_note(f"step {step} of seed {SEED}: {first} and {second}")
                raise
        assert not alice.own_ids & bob.own_ids
        # Each caller had cached answers, sessions and repeated requests.
        for caller in (alice, bob):
            assert len(caller.own_ids) > OPERATIONS / 10
            assert caller.sessions
            assert caller.kept
            assert caller.tokens


async def test_the_model_would_notice() -> None:
    """The model detects an answer that belongs to another caller, for each kind of state."""
    asked = Operation("POST", "/v1/generate", {"prompt": "one", "stream": False})
    keyed = Operation("POST", "/v1/generate", {"prompt": "two", "stream": False}, "k")
    turn = {"messages": [{"role": "user", "content": "one"}], "session_id": "s", "stream": False}
    said = Operation("POST", "/v1/chat", turn)
    async with start() as client:
        for done, noticed_by in (
            (asked, asked),
            (keyed, keyed),
            (said, Operation("GET", "/v1/sessions/s")),
            (said, Operation("DELETE", "/v1/sessions/s")),
            (asked, Operation("GET", "/v1/usage")),
        ):
            # The same key acts twice, and the second model does not know of the first action.
            stranger, alice = callers(client)[0], callers(client)[0]
            with contextlib.suppress(AssertionError):
                await stranger.do(done)
            with pytest.raises((AssertionError, KeyError)):
                await alice.do(noticed_by)
