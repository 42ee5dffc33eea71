"""Scopes, usage and budgets of keys, and keys that change while the service runs."""

import hashlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient

from app.core.config import PROJECT_ROOT
from app.main import create_app
from tests.api.test_errors import check_error
from tests.conftest import make_settings, running_app
from tests.support.live import LONG, generate, open_stream, rest_of
from tests.support.service import (
    API_KEY,
    OTHER_KEY,
    Service,
    isolated_environment,
    running_service,
)

NOON = 1_774_958_400.0
KEYS: list[dict[str, Any]] = [
    {"name": "app", "key": "app-key"},
    {"name": "counted", "key": "counted-key"},
    {"name": "repeated", "key": "repeated-key"},
    {"name": "limited", "key": "limited-key", "daily_tokens": 10},
    {"name": "streaming", "key": "streaming-key", "daily_tokens": 10},
    {"name": "scraper", "key": "scraper-key", "scopes": ["metrics"]},
    {"name": "boss", "key": "boss-key", "scopes": ["admin"]},
]
PROMPT = {"prompt": "hello", "max_tokens": 4, "cache": False}


def key(name: str) -> dict[str, Any]:
    """The headers of a named key."""
    return {"headers": {"X-API-Key": f"{name}-key"}}


@pytest.fixture(scope="module")
def keyed() -> Iterator[TestClient]:
    """A client of an application with KEYS, and a key for /metrics."""
    with running_app(
        security={"api_keys": KEYS},
        metrics={"require_key": True},
        rate_limit={"enabled": True, "requests_per_minute": 1000},
    ) as client:
        client.app.state.services.state.usage.clock = lambda: NOON  # type: ignore[attr-defined]
        yield client


def test_keys_do_what_they_are_for(keyed: TestClient) -> None:
    """Generating, scraping and seeing all usage each take a key with the scope; api_key has all."""
    for name, generating, scraping, shown in (
        ("app", 200, 403, ["app"]),
        ("scraper", 403, 200, ["scraper"]),
        ("boss", 403, 403, ["default", *(named["name"] for named in KEYS)]),
    ):
        assert keyed.post("/v1/generate", json=PROMPT, **key(name)).status_code == generating
        assert keyed.get("/metrics", **key(name)).status_code == scraping
        usage = keyed.get("/v1/usage", **key(name)).json()
        assert [k["name"] for k in usage["keys"]] == shown
    assert keyed.get("/metrics").status_code == 200
    assert len(keyed.get("/v1/usage").json()["keys"]) == 1 + len(KEYS)


def test_a_refusal_names_the_scope(keyed: TestClient) -> None:
    """A key without the scope gets 403 that names it, as in RFC 6750, and counts for the limit."""
    response = keyed.post("/v1/chat", content=b"{", **key("scraper"))
    assert check_error(response, 403, "insufficient_scope")["type"] == "permission_error"
    assert 'scope="infer"' in response.headers["www-authenticate"]
    assert int(response.headers["x-ratelimit-remaining"]) < 1000
    check_error(keyed.get("/v1/sessions/s", **key("boss")), 403, "insufficient_scope")


def test_guessing_at_the_metrics_is_limited_by_address() -> None:
    """Wrong keys at /metrics count against the limit of their address."""
    limits = {"enabled": True, "burst_size": 3}
    app = create_app(make_settings(metrics={"require_key": True}, rate_limit=limits))
    client = TestClient(app)
    codes = [client.get("/metrics", headers={"X-API-Key": str(i)}).status_code for i in range(5)]
    assert codes == [401] * 3 + [429] * 2
    # A scraper with a key is not limited.
    good = {"X-API-Key": API_KEY}
    assert {client.get("/metrics", headers=good).status_code for _ in range(5)} == {200}


def test_usage_counts_what_the_model_did(keyed: TestClient) -> None:
    """Each answer counts as a request; its tokens count unless they came from the cache."""
    kept = {**PROMPT, "cache": True}
    answered: list[dict[str, Any]] = [PROMPT, kept, kept, {**PROMPT, "stream": True}]
    for body in answered:
        assert keyed.post("/v1/generate", json=body, **key("counted")).status_code == 200
    failed: list[dict[str, Any]] = [{"prompt": ""}, {"prompt": "[echo:fault]", "cache": False}]
    for body in failed:
        keyed.post("/v1/generate", json=body, **key("counted"))
    (own,) = keyed.get("/v1/usage", **key("counted")).json()["keys"]
    assert own["name"] == "counted"
    # The fault comes after the request was accepted, and before its first token.
    used = {"requests": 5, "prompt_tokens": 15, "completion_tokens": 12, "total_tokens": 27}
    assert own["today"] == own["total"] == used
    assert own["daily_tokens"] is own["remaining_tokens"] is None


def test_a_repeated_request_is_used_once(keyed: TestClient) -> None:
    """A repeated answer of an idempotency key is counted once."""
    headers = {**key("repeated")["headers"], "Idempotency-Key": "k"}
    for _ in range(3):
        keyed.post("/v1/generate", json=PROMPT, headers=headers)
    (own,) = keyed.get("/v1/usage", **key("repeated")).json()["keys"]
    assert own["today"]["requests"] == 1


@pytest.mark.parametrize(("name", "stream"), [("limited", False), ("streaming", True)])
def test_a_spent_budget_is_429_until_the_day_ends(
    keyed: TestClient, name: str, stream: bool
) -> None:
    """A key that has used its tokens of the day is 429; other keys and other routes work."""
    body = {**PROMPT, "stream": stream}
    for _ in range(2):
        assert keyed.post("/v1/generate", json=body, **key(name)).status_code == 200
    chat = {"messages": [{"role": "user", "content": "a"}], "session_id": "s", "stream": stream}
    for path, refused in (("/v1/generate", body), ("/v1/chat", chat)):
        response = keyed.post(path, json=refused, **key(name))
        error = check_error(response, 429, "token_budget_exceeded")
        assert error["type"] == "rate_limit_error"
        assert response.headers["retry-after"] == str(12 * 3600)
    usage = keyed.get("/v1/usage", **key(name)).json()
    assert (usage["day"], usage["seconds_left"]) == ("2026-03-31", 12 * 3600)
    (own,) = usage["keys"]
    # Two answers, each with five prompt tokens and four generated ones.
    assert (own["today"]["total_tokens"], own["remaining_tokens"]) == (18, 0)
    assert keyed.post("/v1/generate", json=body).status_code == 200


# --- Keys that change -----------------------------------------------------------------------------


class Keys:
    """The keys of a running service, in a config.yml that a test rewrites."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.yml"

    def write(self, *keys: dict[str, Any]) -> None:
        """Write these keys into the file."""
        config = yaml.safe_load((PROJECT_ROOT / "config.yml").read_text(encoding="utf-8"))
        config["security"]["api_keys"] = list(keys)
        self.path.write_text(yaml.safe_dump(config), encoding="utf-8")


def hang_up(service: Service, reading: str) -> dict[str, Any]:
    """Send SIGHUP and wait for its line in the log."""
    seen = len(service.log())
    service.process.send_signal(signal.SIGHUP)

    def lines() -> list[dict[str, Any]]:
        return [e for e in service.log()[seen:] if e["message"].startswith("SIGHUP")]

    service.wait_for(lines, "the log's line about SIGHUP", 20)
    (line,) = lines()
    assert reading in line["message"]
    return line


@pytest.fixture
def changing(tmp_path: Path) -> Iterator[tuple[Service, Keys]]:
    """A slow service whose named keys come from a file only."""
    keys = Keys(tmp_path)
    keys.write({"name": "old", "key": OTHER_KEY})
    with running_service(
        CONFIG_FILE=str(keys.path), SECURITY__API_KEYS=None, ENGINE__ECHO_STEP_SECONDS="0.02"
    ) as service:
        yield service, keys


def test_keys_change_without_a_restart(changing: tuple[Service, Keys]) -> None:
    """SIGHUP loads new keys and drops old ones; streams go on, a bad file changes nothing."""
    service, keys = changing
    new = "new-key-0123456789"
    digest = f"sha256:{hashlib.sha256(new.encode()).hexdigest()}"

    def status(value: str) -> int:
        with service.client(key=value) as client:
            return client.post("/v1/generate", json=generate("a")).status_code

    assert (status(OTHER_KEY), status(new)) == (200, 401)
    with open_stream(service, generate(LONG, max_tokens=100), key=OTHER_KEY) as stream:
        keys.write({"name": "new", "digest": digest})
        line = hang_up(service, "2 accepted: default, new")
        assert line["level"] == "INFO"
        assert (status(OTHER_KEY), status(new), status(API_KEY)) == (401, 200, 200)
        assert rest_of(stream)[-1]["tokens_generated"] == 100
    canary = "canary-of-a-key"
    for broken in (
        f"security: {{api_keys: [{{name: {canary}",
        f"security: {{api_keys: [{{name: a, key: {canary}, scopes: [root]}}]}}",
    ):
        keys.path.write_text(broken, encoding="utf-8")
        assert hang_up(service, "stay as they are: configuration error")["level"] == "ERROR"
        assert (status(OTHER_KEY), status(new)) == (401, 200)
    assert canary not in service.raw_log()
    assert digest[7:] not in service.raw_log()
    # The engine was never restarted.
    assert len(service.engine_pids()) == 1


def test_a_closed_terminal_still_ends_the_service() -> None:
    """SIGHUP from a terminal that was closed ends the service."""
    leader, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "app.main:app", "--port", "0"],
        cwd=PROJECT_ROOT,
        env=isolated_environment({}),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=_take_terminal,  # noqa: PLW1509 - no threads in this child before exec
    )
    os.close(terminal)
    try:
        heard = b""
        deadline = time.monotonic() + 60
        while b"ready for requests" not in heard:
            assert time.monotonic() < deadline, heard
            heard += os.read(leader, 65536)
        os.close(leader)
        # 120: Python could not flush its output, because the terminal is closed.
        assert process.wait(30) in (0, -signal.SIGTERM, 120)
    finally:
        process.kill()
        process.wait()


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
