"""The metrics, rules and dashboard, checked by the real promtool and a real Prometheus.

Both are in Debian's package `prometheus`; without them the tests are skipped.
"""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from app.core.config import PROJECT_ROOT
from app.core.metrics import Metrics
from tests.support.raw import RawClient
from tests.support.service import Service, running_service

DEPLOY = PROJECT_ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yml"
CONFIG = DEPLOY / "prometheus" / "prometheus.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "llm-service.json"

# Histograms whose buckets name the sampled traces behind them.
LATENCIES = (
    "http_request_duration_seconds_bucket",
    "llm_request_duration_seconds_bucket",
    "llm_request_queue_seconds_bucket",
    "llm_time_to_first_token_seconds_bucket",
)
TRACE = "0af7651916cd43dd8448eb211c80319c"

needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="needs promtool (Debian's package prometheus)"
)
needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="needs Prometheus (Debian's package prometheus)"
)


def collectors(metrics: Metrics) -> list[MetricWrapperBase]:
    """Every metric that `metrics` holds."""
    return [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]


def touch(collector: MetricWrapperBase) -> None:
    """Give a metric a value, with some labels if it has any."""
    names = collector._labelnames
    child: Any = collector.labels(*("some value" for _ in names)) if names else collector
    if isinstance(collector, Counter):
        child.inc()
    elif isinstance(collector, Gauge):
        child.set(1)
    elif isinstance(collector, Histogram):
        child.observe(0.1)
    else:
        pytest.fail(f"{collector} is of a kind this test does not know")


@pytest.fixture
def page() -> str:
    """The metrics page with every metric on it."""
    metrics = Metrics()
    for collector in collectors(metrics):
        touch(collector)
    metrics.add_engine_process(os.getpid)
    return metrics.render()[0].decode()


def promtool(*arguments: str, text: str | None = None) -> None:
    """Run promtool, and assert that it finds no fault."""
    done = subprocess.run(
        ["promtool", *arguments], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def queries() -> list[str]:
    """Every query of the dashboard, as Grafana writes it."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def alert_expressions() -> list[str]:
    """The expression of every alert rule."""
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


@needs_promtool
def test_promtool_accepts_the_page_with_every_metric_on_it(page: str) -> None:
    """Names, types and help texts follow Prometheus' conventions."""
    promtool("check", "metrics", text=page)


@pytest.mark.parametrize(
    ("sample", "labels"),
    [
        ("http_requests_total", "method endpoint status"),
        ("tokens_generated_total", "model"),
        ("http_request_duration_seconds_count", "method endpoint"),
    ],
)
def test_the_documented_metrics_have_the_documented_labels(
    page: str, sample: str, labels: str
) -> None:
    """The three metrics of the README have its labels."""
    found = re.search(rf"^{sample}{{(.*)}} ", page, re.MULTILINE)
    assert found
    assert sorted(re.findall(r'(\w+)="', found[1])) == sorted(labels.split())


@needs_promtool
def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    """Prometheus accepts the configuration and the rules of deploy/."""
    promtool("check", "config", str(CONFIG))
    promtool("check", "rules", str(RULES))


@needs_promtool
def test_each_alert_fires_when_it_should_and_only_then() -> None:
    """The unit tests of the rules pass, and each rule has one."""
    tests = RULES.with_name("alerts_test.yml")
    promtool("test", "rules", str(tests))
    fired = {
        case["alertname"]
        for test in yaml.safe_load(tests.read_text(encoding="utf-8"))["tests"]
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    assert fired == {rule["alert"] for group in groups for rule in group["rules"]}


def test_each_alert_says_what_to_do() -> None:
    """Each alert has a summary, a description and a line on what to do."""
    for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            assert set(rule["annotations"]) == {"summary", "description", "runbook"}, rule["alert"]


def test_a_panel_has_one_unit() -> None:
    """A panel shows either amounts or rates, and its unit says which."""
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        kinds = {"rate(" in target["expr"] for target in panel.get("targets", ())}
        assert len(kinds) <= 1, panel["title"]
        if kinds == {False}:
            assert panel["fieldConfig"]["defaults"]["unit"] not in {"reqps", "cps"}, panel["title"]


def metric_names(expression: str) -> set[str]:
    """The metrics of a PromQL expression: what is left without labels, ranges and functions."""
    bare = re.sub(r"{[^}]*}|\[[^]]*]", "", expression)
    bare = re.sub(r"\b(by|on|without) *\([^)]*\)", "", bare)
    return set(re.findall(r"\b[a-z]\w+\b(?! *\()", bare)) - {"or", "unless"}


def test_dashboard_and_alerts_ask_only_for_metrics_that_exist(page: str) -> None:
    """Each metric that a panel or an alert uses is exported."""
    exported = set(re.findall(r"^(\w+)[{ ]", page, re.MULTILINE)) | {"up"}
    for expression in [*queries(), *alert_expressions()]:
        named = metric_names(expression)
        assert named, expression
        assert named <= exported, expression


def test_the_dashboard_shows_every_metric() -> None:
    """Each metric is in a panel of the dashboard."""
    shown = {name for query in queries() for name in metric_names(query)}
    for collector in collectors(Metrics()):
        (metric,) = collector.describe()
        assert any(name.startswith(metric.name) for name in shown), metric.name


@contextmanager
def running_prometheus(folder: Path, target: str) -> Iterator[httpx.Client]:
    """A real Prometheus with deploy/'s configuration, but scraping `target` five times a second."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log_path = folder / "prometheus.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            yield client
    except BaseException as error:
        error.add_note(f"--- Prometheus' log ---\n{log_path.read_text(encoding='utf-8')[-4000:]}")
        raise
    finally:
        process.terminate()
        process.wait(10)


def use(service: Service) -> None:
    """Change the metrics: by requests that find no place, are repeated, too many, or have hints."""
    once = {
        "messages": [{"role": "user", "content": "Tell a story to jane.doe@example.com"}],
        "max_tokens": 10,
        "cache": False,
    }
    kept = {"prompt": "Tell me a story", "max_tokens": 10}

    def post(path: str, body: dict[str, Any]) -> int:
        with service.client() as client:
            headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
            if body is kept:
                headers["Idempotency-Key"] = "the same"
            return client.post(path, json=body, headers=headers).status_code

    with RawClient(service) as client:
        assert client.ask(b"no HTTP\r\n\r\n").status == 400
    with ThreadPoolExecutor(3) as pool:
        requests = [("/v1/chat", once), ("/v1/chat", once), ("/v1/generate", kept)]
        requests.append(("/v1/chat/completions", {**once, "model": "default", "store": True}))
        list(pool.map(lambda request: post(*request), requests))


def has_data(prometheus: httpx.Client, query: str) -> bool:
    """Whether a dashboard's query returns numbers."""
    query = query.replace("$__rate_interval", "30s").replace("$__range", "5m")
    query = query.replace("$instance", ".*")
    try:
        answer = prometheus.get("/api/v1/query", params={"query": query})
    except httpx.TransportError:
        # It is still starting.
        return False
    if answer.status_code == 503:
        return False
    assert answer.status_code == 200, answer.text
    values = [float(result["value"][1]) for result in answer.json()["data"]["result"]]
    return any(math.isfinite(value) for value in values)


@needs_prometheus
def test_a_real_prometheus_scrapes_the_service_and_fills_the_dashboard(tmp_path: Path) -> None:
    """Each query of the dashboard has data, each alert can be evaluated, latencies name traces."""
    with (
        running_service(
            MODEL__ENGINE="echo",
            ENGINE__MAX_RUNNING="1",
            ENGINE__MAX_WAITING="0",
            ENGINE__ECHO_STEP_SECONDS="0.02",
            PII__INPUT="redact",
            RATE_LIMIT__ENABLED="true",
            RATE_LIMIT__REQUESTS_PER_MINUTE="120",
            RATE_LIMIT__BURST_SIZE="5",
            # Nobody is there, and exemplars are made all the same.
            OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9",
        ) as service,
        running_prometheus(tmp_path, service.base_url.removeprefix("http://")) as prometheus,
    ):
        empty = queries()
        deadline = time.monotonic() + 60
        # A rate needs two scrapes with traffic between them.
        while empty and time.monotonic() < deadline:
            use(service)
            empty = [query for query in empty if not has_data(prometheus, query)]
        assert not empty, f"no data for {empty}"
        rules = prometheus.get("/api/v1/rules").json()["data"]["groups"][0]["rules"]
        assert {rule["name"]: rule["lastError"] for rule in rules if rule.get("lastError")} == {}
        assert {rule["health"] for rule in rules} == {"ok"}
        query: dict[str, Any] = {
            "query": f'{{__name__=~"{"|".join(LATENCIES)}"}}',
            "start": time.time() - 600,
        }
        found = prometheus.get("/api/v1/query_exemplars", params={**query, "end": time.time()})
        traces = found.json()["data"]
        assert {s["seriesLabels"]["__name__"] for s in traces} == set(LATENCIES)
        assert {e["labels"]["trace_id"] for s in traces for e in s["exemplars"]} == {TRACE}
