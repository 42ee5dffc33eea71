"""Random sequences of turns and deletions, compared with a model of the histories."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from starlette.testclient import TestClient

from tests.conftest import running_app
from tests.support.openai import CHAT, user
from tests.support.service import API_KEY, OTHER_KEY

MAX_MESSAGES = 6

owners = st.tuples(st.sampled_from([API_KEY, OTHER_KEY]), st.sampled_from(["a", "b"]))
# U+FFFD stands for bytes that are no character; the end of an answer never has one.
texts = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="\ufffd"),
    min_size=1,
    max_size=8,
)


class Sessions(RuleBasedStateMachine):
    """Two callers that use the same two session names."""

    client: TestClient

    def __init__(self) -> None:
        super().__init__()
        self.histories: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for key in (API_KEY, OTHER_KEY):
            for name in "ab":
                self.client.delete(f"/v1/sessions/{name}", headers={"X-API-Key": key})

    def _send(self, owner: tuple[str, str], text: str, **fields: Any) -> int:
        body = {"messages": user(text), "session_id": owner[1], **fields}
        response = self.client.post("/v1/chat", json=body, headers={"X-API-Key": owner[0]})
        return response.status_code

    def _said(self, owner: tuple[str, str], text: str) -> None:
        answer = {"role": "assistant", "content": text}
        history = [*self.histories.get(owner, []), *user(text), answer]
        self.histories[owner] = history[-MAX_MESSAGES:]

    @rule(owner=owners, text=texts, stream=st.booleans(), cache=st.booleans())
    def say(self, owner: tuple[str, str], text: str, *, stream: bool, cache: bool) -> None:
        """A turn, whole or streamed, cached or not."""
        assert self._send(owner, text, stream=stream, cache=cache) == 200
        self._said(owner, text)

    @rule(owner=owners, text=texts)
    def say_as_openai(self, owner: tuple[str, str], text: str) -> None:
        """A turn on OpenAI's route, with the session in a header."""
        headers = {"X-API-Key": owner[0], "X-Session-ID": owner[1]}
        body = {"model": "default", "messages": user(text)}
        assert self.client.post(CHAT, json=body, headers=headers).status_code == 200
        self._said(owner, text)

    @rule(owner=owners, text=texts)
    def say_what_is_refused(self, owner: tuple[str, str], text: str) -> None:
        """A turn that is refused does not change the history."""
        assert self._send(owner, text, temperature=3) == 422
        assert self._send(owner, text, max_tokens=10**9) == 422
        assert self._send(owner, text, response_format={"type": "json_object"}) == 400

    @rule(owner=owners)
    def forget(self, owner: tuple[str, str]) -> None:
        """DELETE is 204 for a known session, else 404."""
        known = self.histories.pop(owner, None) is not None
        path, headers = f"/v1/sessions/{owner[1]}", {"X-API-Key": owner[0]}
        assert self.client.delete(path, headers=headers).status_code == (204 if known else 404)

    @invariant()
    def histories_are_what_was_said(self) -> None:
        """Each caller sees the newest messages of its own sessions, and no other session."""
        for key in (API_KEY, OTHER_KEY):
            for name in "ab":
                response = self.client.get(f"/v1/sessions/{name}", headers={"X-API-Key": key})
                expected = self.histories.get((key, name))
                assert response.status_code == (404 if expected is None else 200)
                assert expected is None or response.json()["messages"] == expected


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """An application that keeps few messages."""
    with running_app(chat_history={"max_messages": MAX_MESSAGES}) as running:
        yield running


@pytest.mark.no_cover
def test_sessions_follow_their_model(client: TestClient) -> None:
    """Sequences of turns, refusals and deletions by two callers, checked after every step."""
    machine = type("Machine", (Sessions,), {"client": client})
    few = settings(
        max_examples=8,
        stateful_step_count=12,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )
    run_state_machine_as_test(machine, settings=few)
