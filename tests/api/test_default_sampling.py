"""Sampling of requests that name none: the model's recommendation, or a configured temperature."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from starlette.testclient import TestClient

from app.llm.protocol import NEUTRAL_SAMPLING, SamplingParams
from tests.conftest import RunApp, running_app
from tests.support.openai import chat, complete

RECOMMENDED = {"temperature": 0.25, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
DEFAULTS = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/generate": {"prompt": "x"},
    "/v1/chat": {"messages": [{"role": "user", "content": "x"}]},
}


def recommend(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the served model recommend a sampling."""
    engine = client.app.state.services.engine  # type: ignore[attr-defined]
    described = msgspec.structs.replace(engine.info, sampling=RECOMMENDED)
    monkeypatch.setattr(engine, "info", described)


@pytest.fixture(scope="module")
def shared() -> Iterator[TestClient]:
    """An application whose temperature is not configured."""
    with running_app() as client:
        yield client


@pytest.fixture
def client(shared: TestClient, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """The same, with a model that recommends a sampling."""
    recommend(shared, monkeypatch)
    return shared


def sampling_of(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> list[SamplingParams]:
    """What the engine gets for a request to each route."""
    engine = client.app.state.services.engine  # type: ignore[attr-defined]
    sent: list[SamplingParams] = []
    admit = engine.admit

    def admitting(*args: Any) -> Any:
        place = admit(*args)
        start = place.start

        def starting(request: Any) -> None:
            sent.append(request.sampling)
            start(request)

        place.start = starting
        return place

    with monkeypatch.context() as patch:
        patch.setattr(engine, "admit", admitting)
        fields = {**fields, "cache": False}
        for path, body in ROUTES.items():
            assert client.post(path, json={**body, **fields}).status_code == 200
        assert chat(client, **fields).status_code == 200
        assert complete(client, **fields).status_code == 200
    return sent


def status(client: TestClient) -> dict[str, float]:
    """The defaults that /status shows."""
    found: dict[str, float] = client.get("/status").json()["model"]["sampling"]
    return found


def test_a_request_that_names_nothing_is_sampled_as_recommended(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each generating route uses what the model recommends, and /status shows it."""
    expected = SamplingParams(**RECOMMENDED)  # type: ignore[arg-type]
    for fields in ({}, dict.fromkeys(RECOMMENDED)):
        assert sampling_of(client, monkeypatch, fields) == [expected] * 4
    assert status(client) == {**DEFAULTS, **RECOMMENDED}


def test_what_a_request_names_wins(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fields of a request win over the recommendation, also where they change nothing."""
    neutral = {name: getattr(NEUTRAL_SAMPLING, name) for name in RECOMMENDED}
    assert sampling_of(client, monkeypatch, neutral) == [NEUTRAL_SAMPLING] * 4


def test_a_configured_temperature_wins(run_app: RunApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator's temperature wins over the model's, even if it is the default."""
    client = run_app(model={"engine": "echo", "temperature": 0.7})
    recommend(client, monkeypatch)
    expected = SamplingParams(**{**RECOMMENDED, "temperature": 0.7})  # type: ignore[arg-type]
    assert sampling_of(client, monkeypatch, {}) == [expected] * 4
    assert status(client) == {**DEFAULTS, **RECOMMENDED, "temperature": 0.7}


def test_a_model_that_recommends_nothing_has_the_services_defaults(
    shared: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a recommendation the temperature is that of the settings, and nothing is cut off."""
    assert sampling_of(shared, monkeypatch, {}) == [SamplingParams(temperature=0.7)] * 4
    assert status(shared) == DEFAULTS


def test_answers_are_kept_by_the_sampling_in_force(client: TestClient) -> None:
    """A request that names the default shares the kept answer of one that does not."""
    first = client.post("/v1/generate", json={"prompt": "kept"})
    same = client.post("/v1/generate", json={"prompt": "kept", "top_p": RECOMMENDED["top_p"]})
    other = client.post("/v1/generate", json={"prompt": "kept", "top_p": 1.0})
    assert [r.json()["cached"] for r in (first, same, other)] == [False, True, False]
