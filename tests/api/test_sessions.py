"""Chats with a session_id, over HTTP, on the echo engine."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support.application import KEY, OTHER, Client, start

# The tests share an application, which lives on one event loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def application() -> AsyncIterator[Client]:
    """An application with the default limits, which generates every answer anew."""
    async with start(engine={"echo_step_seconds": 0.001}, cache={"enabled": False}) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def roomy() -> AsyncIterator[Client]:
    """An application whose answers may fill half of the context."""
    async with start(model={"engine": "echo", "max_tokens": 4000}) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(application: Client) -> AsyncIterator[Client]:
    """The application, without any session."""
    yield application
    for key in (KEY, OTHER):
        await application.http.delete("/v1/sessions/s", headers={"X-API-Key": key})


async def test_history_stands_before_the_new_messages(client: Client) -> None:
    """The second prompt contains the first turn, and the history has both in order."""
    first = await client.say("one")
    second = await client.say("two")
    assert first.json()["session_id"] == "s"
    assert second.json()["usage"]["prompt_tokens"] > first.json()["usage"]["prompt_tokens"]
    assert await client.history() == [
        ("user", "one"),
        ("assistant", "one"),
        ("user", "two"),
        ("assistant", "two"),
    ]


async def test_without_a_session_nothing_is_kept(client: Client) -> None:
    """A stateless chat makes no session."""
    response = await client.say("one", session=None)
    assert "session_id" not in response.json()
    assert len(client.services.state.sessions) == 0


async def test_another_keys_session_does_not_exist(client: Client) -> None:
    """The same name under another key is another session, on every route."""
    await client.say("mine")
    assert await client.history(key=OTHER) is None
    gone = await client.http.delete("/v1/sessions/s", headers={"X-API-Key": OTHER})
    assert gone.status_code == 404
    await client.say("theirs", key=OTHER)
    assert await client.history(key=OTHER) == [("user", "theirs"), ("assistant", "theirs")]
    assert await client.history() == [("user", "mine"), ("assistant", "mine")]


async def test_a_deleted_session_is_forgotten(client: Client) -> None:
    """After DELETE a session is gone, a second DELETE is 404, and a new turn has no history."""
    await client.say("one")
    assert (await client.http.delete("/v1/sessions/s")).status_code == 204
    assert await client.history() is None
    assert (await client.http.delete("/v1/sessions/s")).status_code == 404
    await client.say("two")
    assert await client.history() == [("user", "two"), ("assistant", "two")]


async def test_a_session_deleted_during_a_turn_stays_deleted(client: Client) -> None:
    """A turn that runs during DELETE is answered, and does not bring the session back."""
    turn = asyncio.create_task(client.say("x" * 300))
    await client.until_running()
    assert (await client.http.delete("/v1/sessions/s")).status_code == 204
    assert (await turn).status_code == 200
    assert await client.history() is None


async def test_two_turns_at_once_conflict(client: Client) -> None:
    """The second turn gets 409 session_busy; the first is answered and kept."""
    turn = asyncio.create_task(client.say("x" * 300))
    await client.until_running()
    second = await client.say("me too")
    assert second.status_code == 409
    assert second.json()["error"]["code"] == "session_busy"
    assert (await turn).status_code == 200
    assert len(await client.history() or []) == 2


async def test_a_failed_turn_leaves_the_history_as_it_was(client: Client) -> None:
    """A turn that fails in the engine is not kept, and the session is free again."""
    await client.say("one")
    assert (await client.say("[echo:fault]")).status_code == 500
    assert await client.history() == [("user", "one"), ("assistant", "one")]
    assert (await client.say("two")).status_code == 200


async def test_a_refused_turn_leaves_no_trace(client: Client) -> None:
    """A turn that is too long for the context is 400, and makes no session."""
    refused = await client.say(
        "x", max_tokens=512, messages=[{"role": "user", "content": "é" * 3900}]
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert await client.history() is None
    assert len(client.services.state.sessions) == 0


async def test_a_cancelled_turn_leaves_the_history_as_it_was(client: Client) -> None:
    """A turn whose client leaves is not kept, and the session is free again."""
    await client.say("one")
    task = asyncio.create_task(client.say("x" * 2000, stream=True))
    await client.until_running()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await client.history() == [("user", "one"), ("assistant", "one")]
    assert (await client.say("two")).status_code == 200


async def test_a_streamed_turn_is_kept_too(client: Client) -> None:
    """The history has the joined pieces of a streamed turn."""
    response = await client.say("Grüße 😀", stream=True)
    events = [
        json.loads(line.removeprefix("data: "))
        for line in response.text.splitlines()
        if line.startswith("data: {")
    ]
    text = "".join(e["delta"].get("content", "") for e in events)
    assert await client.history() == [("user", "Grüße 😀"), ("assistant", text)]


async def test_the_system_message_is_kept_and_can_be_replaced(client: Client) -> None:
    """A system message is sent once, and kept in front of every later turn."""
    system = {"role": "system", "content": "Be brief."}
    await client.say("", messages=[system, {"role": "user", "content": "one"}])
    await client.say("two")
    session = (await client.http.get("/v1/sessions/s")).json()
    assert session["system"] == "Be brief."
    assert [m["role"] for m in session["messages"]] == ["user", "assistant"] * 2


async def test_switched_off_sessions_are_refused_not_ignored() -> None:
    """With chat_history.enabled false a session_id is an error."""
    async with start(chat_history={"enabled": False}) as client:
        refused = await client.say("one")
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "session_id"
        assert (await client.say("one", session=None)).status_code == 200


async def test_old_turns_are_dropped_to_fit_the_context(roomy: Client) -> None:
    """A history beyond the context loses its oldest turns, but not the system message."""
    system = {"role": "system", "content": "Be brief."}
    text = "x" * 1400
    await roomy.say("", messages=[system, {"role": "user", "content": text}], max_tokens=1500)
    dropped = []
    for _ in range(4):
        response = await roomy.say(text, max_tokens=1500)
        assert response.status_code == 200, response.text
        usage = response.json()["usage"]
        dropped.append(usage.get("dropped_messages", 0))
        assert usage["prompt_tokens"] + 1500 <= 8192
    assert dropped[0] == 0
    assert dropped[-1] > 0
    assert all(d % 2 == 0 for d in dropped)
    assert (await roomy.http.get("/v1/sessions/s")).json()["system"] == "Be brief."


async def test_history_is_dropped_at_the_exact_edge(roomy: Client) -> None:
    """A follow-up near the limit of the context is answered, with or without its history."""
    kept_sizes: list[int] = []
    dropped_sizes: list[int] = []
    # A token is a byte. The first turn leaves about 200 tokens of the context.
    for size in range(20, 400, 20):
        await roomy.say("x" * 1900, session=f"s{size}")
        response = await roomy.say("y" * size, session=f"s{size}", max_tokens=4000)
        assert response.status_code == 200, response.text
        usage = response.json()["usage"]
        (dropped_sizes if "dropped_messages" in usage else kept_sizes).append(size)
        assert usage["prompt_tokens"] + 4000 <= 8192
    assert kept_sizes
    assert dropped_sizes
    assert max(kept_sizes) < min(dropped_sizes)


@pytest.mark.no_cover
async def test_a_session_at_its_limits_is_counted_few_times(
    roomy: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long a history is, its tokens are counted three times a turn at most."""
    counted: list[int] = []
    count = roomy.services.generation.prompt_tokens

    async def counting(job: Any) -> list[int]:
        tokens = await count(job)
        counted.append(len(tokens))
        return tokens

    monkeypatch.setattr(roomy.services.generation, "prompt_tokens", counting)
    usage: dict[str, int] = {}
    for number in range(45):
        counted.clear()
        response = await roomy.say("x" * (37 * number % 400 + 1), session="long", max_tokens=4000)
        usage = response.json()["usage"]
        assert len(counted) <= 3
        # What is encoded is about what is used.
        assert max(counted, default=0) < 8192
    assert usage["dropped_messages"] > 60
    assert usage["prompt_tokens"] > 3500


async def test_a_full_queue_refuses_a_follow_up_before_its_history_is_counted() -> None:
    """A turn is refused by a full queue before its history is tokenized."""
    async with start(engine={"max_running": 1, "max_waiting": 0}) as client:
        await client.say("one")
        counted: list[object] = []
        count = client.services.generation.prompt_tokens

        async def counting(job: Any) -> list[int]:
            counted.append(job)
            return await count(job)

        client.services.generation.prompt_tokens = counting  # type: ignore[method-assign]
        place = client.services.engine.admit()
        refused = await client.say("two")
        assert (refused.status_code, counted) == (503, [])
        assert refused.json()["error"]["code"] == "overloaded"
        place.release()
        assert (await client.say("two")).status_code == 200
        assert len(counted) == 1


@pytest.mark.parametrize("session_id", ["", "a b", "x" * 129, "a/b", "ü"])
async def test_bad_session_ids_are_refused(client: Client, session_id: str) -> None:
    """A name outside the allowed characters is 422 and names the field."""
    refused = await client.say("one", session=session_id)
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == "session_id"
