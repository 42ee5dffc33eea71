"""The metrics, and that callers cannot make their number grow."""

import json
import platform
import random
import string
from collections import Counter
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from app import __version__
from app.api.errors import METHODS
from app.main import create_app
from tests.api.test_auth import KEYED
from tests.conftest import make_settings
from tests.support.asgi import Leaving, Received, Sent, http_scope
from tests.support.service import API_KEY

UNMATCHED_GET = {"method": "GET", "endpoint": "unmatched", "status": "404"}


def samples(client: TestClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of /metrics."""
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(client: TestClient, name: str, **labels: str) -> float:
    """One sample, 0 where it does not exist yet."""
    return samples(client).get((name, tuple(sorted(labels.items()))), 0.0)


def test_openmetrics_has_the_same_figures_for_who_asks(client: TestClient) -> None:
    """A reader that accepts OpenMetrics gets the samples of the text format, without exemplars."""
    client.post("/v1/generate", json={"prompt": "a"})
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    response = client.get("/metrics", headers={"Accept": accept})
    families = list(open_metrics(response.text))  # type: ignore[no-untyped-call]
    found = {s.name for family in families for s in family.samples}
    assert found == {name for name, _ in samples(client)}
    assert not any(s.exemplar for family in families for s in family.samples)


def test_a_request_is_counted_under_its_route(client: TestClient) -> None:
    """Method, route and status of an answer are counted, and its duration observed, once."""
    generate = {"method": "POST", "endpoint": "/v1/generate"}
    before = samples(client)
    client.post("/v1/generate", json={"prompt": "a"})
    client.post("/v1/generate", json={})
    client.post("/v1/generate", json={"prompt": "a"}, headers={"X-API-Key": "wrong"})
    after = samples(client)

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after.get(key, 0) - before.get(key, 0)

    for status in ("200", "422", "401"):
        assert grown("http_requests_total", **generate, status=status) == 1
    assert grown("http_request_duration_seconds_count", **generate) == 3


def test_generated_tokens_are_counted_by_model(client: TestClient) -> None:
    """tokens_generated_total grows by exactly the tokens that the answer says were generated."""
    before = value(client, "tokens_generated_total", model="echo")
    answer = client.post("/v1/generate", json={"prompt": "tokens", "cache": False}).json()
    grown = value(client, "tokens_generated_total", model="echo") - before
    assert grown == answer["tokens_generated"] == len("tokens") + 1


def test_prompt_tokens_and_timings_are_observed(client: TestClient) -> None:
    """An answer counts its prompt's tokens, and each of its timings once."""
    timings = ("llm_time_to_first_token_seconds", "llm_request_queue_seconds")
    before = samples(client)
    answer = client.post("/v1/generate", json={"prompt": "timings", "cache": False}).json()
    after = samples(client)
    for name in timings:
        assert after[f"{name}_count", ()] == before.get((f"{name}_count", ()), 0) + 1
    # Each token but the first has a time since the one before it.
    assert after["llm_inter_token_latency_seconds_count", ()] > 0
    name = "llm_prompt_tokens_total"
    assert after[name, ()] - before.get((name, ()), 0) == answer["usage"]["prompt_tokens"]
    stopped = ("llm_request_duration_seconds_count", (("finish_reason", "stop"),))
    assert after[stopped] == before.get(stopped, 0) + 1


def test_a_stop_string_is_not_a_client_that_left(client: TestClient) -> None:
    """An answer that a stop string ended counts as finished, and not as cancelled."""
    before = samples(client)
    body = {"prompt": "one two three", "stop": "two", "cache": False}
    assert client.post("/v1/generate", json=body).json()["finish_reason"] == "stop"
    after = samples(client)
    cancelled = ("llm_requests_cancelled_total", ())
    assert after[cancelled] == before[cancelled]
    stopped = ("llm_request_duration_seconds_count", (("finish_reason", "stop"),))
    assert after[stopped] == before.get(stopped, 0) + 1


def test_gauges_return_to_zero(client: TestClient) -> None:
    """The gauges of an idle service are zero."""
    client.post("/v1/generate", json={"prompt": "gauges", "cache": False})
    assert value(client, "llm_requests_running") == 0
    assert value(client, "llm_requests_waiting") == 0


def test_the_model_is_told_once(client: TestClient) -> None:
    """llm_model_info says what is served, as one series."""
    found = [key for key in samples(client) if key[0] == "llm_model_info"]
    labels = {"model": "echo", "engine": "echo", "device": "cpu", "dtype": "none"}
    assert found == [("llm_model_info", tuple(sorted(labels.items())))]


def test_both_processes_and_their_versions_are_told(client: TestClient) -> None:
    """Memory, processor time and files of both processes are shown, and the versions are."""
    found = samples(client)
    for prefix in ("process", "llm_engine_process"):
        assert found[f"{prefix}_resident_memory_bytes", ()] > 2**20
        assert found[f"{prefix}_cpu_seconds_total", ()] > 0
        assert found[f"{prefix}_open_fds", ()] > 2
    starts = [
        found[f"{prefix}_start_time_seconds", ()] for prefix in ("process", "llm_engine_process")
    ]
    # The engine process is another, which this one has started.
    assert starts[0] < starts[1]
    build = (("python", platform.python_version()), ("version", __version__))
    assert found["llm_build_info", build] == 1


def test_an_engine_that_does_not_run_has_no_figures(fresh: TestClient) -> None:
    """Before the engine process is started, its figures are missing, and the page is not."""
    names = {name for name, _ in samples(fresh)}
    assert "process_open_fds" in names
    assert "llm_engine_process_open_fds" not in names


def test_refusals_are_counted_by_reason() -> None:
    """A request refused before admission counts under the error's code."""
    client = TestClient(create_app(make_settings()), headers={"X-API-Key": API_KEY})
    client.post("/v1/generate", json={"prompt": "a"})
    assert value(client, "llm_requests_rejected_total", reason="model_loading") == 1


@pytest.fixture
def fresh() -> TestClient:
    """A client of a new application, whose engine is not started."""
    return TestClient(create_app(make_settings()), headers={"X-API-Key": API_KEY})


@pytest.mark.no_cover
async def test_random_paths_methods_keys_and_ids_add_no_series(fresh: TestClient) -> None:
    """No value of a caller becomes a label: hundreds of values add a few series at most."""
    rng = random.Random(20)

    def word() -> str:
        return "".join(rng.choices(string.ascii_letters, k=12))

    async def ask(method: str, path: str, headers: dict[str, str], **body: str) -> None:
        scope = http_scope(method, path, {"Content-Type": "application/json", **headers})
        scope["query_string"] = f"{word()}={word()}".encode()
        # Leaving() stays here, as there is no text: a client that has asked waits.
        await fresh.app(scope, Leaving(json.dumps(body).encode()).receive, Sent())

    async def invent(count: int) -> None:
        for _ in range(count):
            headers = {"X-API-Key": word(), "X-Request-ID": word(), "X-Session-ID": word()}
            await ask("GET", f"/{word()}/{word()}", headers)
            await ask("GET", f"/v1/{word()}", headers)
            await ask(word().upper(), f"/v1/chat/{word()}", headers)
            await ask(word().upper(), "/v1/chat", headers)
            await ask("POST", "/v1/chat", headers, **{word(): word()})
            await ask("POST", "/v1/generate", {"X-API-Key": API_KEY}, prompt=word(), stop=word())

    samples(fresh)
    await invent(1)
    first = set(samples(fresh))
    await invent(50)
    later = set(samples(fresh))
    assert later == first
    assert len(later) < 500


@pytest.mark.no_cover
@pytest.mark.parametrize("paths", [1_600, pytest.param(10_000, marks=pytest.mark.full_size)])
async def test_random_paths_make_no_more_than_500_series(paths: int) -> None:
    """The whole page has at most 500 series after many paths, whatever their methods and keys."""
    app = create_app(make_settings(logging={"level": "ERROR"}))
    rng = random.Random(12)
    for method in (*METHODS, "BREW") * (paths // 8):
        path = "/" + "".join(rng.choices(string.ascii_letters + "/", k=12))
        await app(http_scope(method, path, {"X-API-Key": path}), Received(b""), Sent())
    client = TestClient(app)
    assert value(client, "http_requests_total", **UNMATCHED_GET) == paths // 8
    assert len(samples(client)) <= 500


async def test_a_wrong_method_has_no_series_of_its_own(fresh: TestClient) -> None:
    """All methods on all routes add series only for the methods that the routes have."""
    for endpoint in KEYED:
        for method in (*METHODS, "BREW"):
            scope = http_scope(method, endpoint.path, {"X-API-Key": API_KEY})
            await fresh.app(scope, Leaving(b"").receive, Sent())
    found = {
        (labels["method"], labels["endpoint"])
        for name, pairs in samples(fresh)
        if name == "http_requests_total" and (labels := dict(pairs))["endpoint"] != "unmatched"
    }
    assert found == {(e.method, e.path) for e in KEYED}


def test_labels_come_from_short_lists(fresh: TestClient) -> None:
    """The labels of HTTP metrics are methods, templates and statuses, and nothing else."""
    fresh.get("/secret-path")
    fresh.request("BREW", "/v1/chat")
    fresh.post("/v1/generate", json={})
    seen: dict[str, Counter[str]] = {}
    for name, labels in samples(fresh):
        if name == "http_requests_total":
            for label, text in labels:
                seen.setdefault(label, Counter())[text] += 1
    assert set(seen["method"]) == {"GET", "POST", "other"}
    assert set(seen["endpoint"]) <= {"unmatched", "/v1/generate", "/metrics"}
    assert set(seen["status"]) == {"404", "405", "422"}


def test_the_users_metrics_have_the_users_labels(client: TestClient) -> None:
    """The three metrics of the user's document carry exactly the labels it names."""
    client.post("/v1/generate", json={"prompt": "a"})
    expected: dict[str, Any] = {
        "http_requests_total": {"method", "endpoint", "status"},
        "http_request_duration_seconds_count": {"method", "endpoint"},
        "tokens_generated_total": {"model"},
    }
    found = {name: {k for k, _ in labels} for name, labels in samples(client)}
    assert {name: found[name] for name in expected} == expected
