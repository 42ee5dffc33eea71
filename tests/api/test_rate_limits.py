"""The token bucket of each caller, with a clock that the tests move."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from app.main import create_app
from tests.api.test_errors import check_error
from tests.conftest import make_settings
from tests.support.asgi import Received, Sent, http_scope
from tests.support.service import API_KEY, OTHER_KEY

# The body is invalid, which is found after the guard: no engine is needed.
BODY = {"prompt": ""}


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Limited:
    """An application that allows 60 requests a minute in bursts of five, and its clock."""

    def __init__(self, **security: Any) -> None:
        self.clock = Clock()
        limits = {"enabled": True, "requests_per_minute": 60, "burst_size": 5}
        self.app = create_app(make_settings(rate_limit=limits, security=security))
        self.app.state.services.limits.buckets.clock = self.clock
        self.client = TestClient(self.app)

    def post(self, key: str = API_KEY, **headers: str) -> Any:
        """A request that is 422 once the guard has let it pass."""
        return self.client.post("/v1/generate", json=BODY, headers={"X-API-Key": key, **headers})

    def metric(self, reason: str) -> float:
        """The number of refusals for a reason."""
        registry = self.app.state.services.metrics.registry
        return registry.get_sample_value("rate_limited_total", {"reason": reason}) or 0.0


@pytest.fixture
def limited() -> Limited:
    """See :class:`Limited`."""
    return Limited()


def test_the_sixth_of_a_burst_of_five_is_429(limited: Limited) -> None:
    """Five requests pass at once, the sixth is 429 with the right Retry-After."""
    for remaining in (4, 3, 2, 1, 0):
        response = limited.post()
        assert response.status_code == 422
        assert response.headers["x-ratelimit-limit"] == "5"
        assert response.headers["x-ratelimit-remaining"] == str(remaining)
        assert response.headers["x-ratelimit-reset"] == str(5 - remaining)
    response = limited.post()
    error = check_error(response, 429, "rate_limit_exceeded")
    assert error["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "1"
    assert response.headers["x-ratelimit-remaining"] == "0"
    assert response.headers["x-ratelimit-reset"] == "5"
    assert limited.metric("key") == 1


def test_waiting_as_told_lets_one_through(limited: Limited) -> None:
    """Exactly one more request passes after Retry-After, and none earlier."""
    for _ in range(5):
        limited.post()
    limited.clock.now += 0.999
    assert limited.post().status_code == 429
    limited.clock.now += 0.001
    assert limited.post().status_code == 422
    assert limited.post().status_code == 429


def test_a_bucket_holds_no_more_than_a_burst(limited: Limited) -> None:
    """After any pause no more than a burst passes at once."""
    limited.post()
    limited.clock.now += 3600
    assert [limited.post().status_code for _ in range(6)] == [422] * 5 + [429]


def test_a_refused_request_costs_nothing(limited: Limited) -> None:
    """Refused requests do not delay the next request that passes."""
    for _ in range(50):
        limited.post()
    limited.clock.now += 1
    assert limited.post().status_code == 422


def test_each_key_has_a_bucket_of_its_own(limited: Limited) -> None:
    """One caller's empty bucket does not limit another caller."""
    for _ in range(6):
        limited.post(API_KEY)
    assert limited.post(OTHER_KEY).headers["x-ratelimit-remaining"] == "4"


def test_all_routes_share_a_callers_bucket(limited: Limited) -> None:
    """All routes count against one bucket of the caller."""
    for path in ("/v1/generate", "/v1/chat", "/v1/generate", "/v1/chat", "/v1/generate"):
        response = limited.client.post(path, json=BODY, headers={"X-API-Key": API_KEY})
        assert response.status_code == 422
    response = limited.client.post("/v1/chat", json=BODY, headers={"X-API-Key": API_KEY})
    check_error(response, 429, "rate_limit_exceeded")


def test_guessing_keys_is_limited_by_address(limited: Limited) -> None:
    """The sixth wrong key of an address is 429."""
    codes = [limited.post(f"wrong-{i}").status_code for i in range(7)]
    assert codes == [401] * 5 + [429] * 2
    assert limited.metric("ip") == 2
    # A valid key from that address is let in.
    assert limited.post(API_KEY).status_code == 422


def test_refusals_and_errors_carry_the_limit_headers(limited: Limited) -> None:
    """401, 400 and 422 have the headers of the limit that they count against."""
    key = {"X-API-Key": API_KEY}
    for response in (
        limited.post("wrong"),
        limited.client.post("/v1/generate", content=b"{", headers=key),
        limited.post(),
    ):
        assert int(response.headers["x-ratelimit-remaining"]) >= 3
    assert limited.client.get("/v1/generate", headers=key).status_code == 405


def test_health_is_never_limited(limited: Limited) -> None:
    """Probes and scrapes are not limited."""
    for _ in range(20):
        assert limited.client.get("/livez").status_code == 200
        assert limited.client.get("/metrics").status_code == 200


async def _status(limited: Limited, peer: str, forwarded: str) -> int:
    headers = {"X-API-Key": "wrong", "X-Forwarded-For": forwarded}
    sent = Sent()
    scope = http_scope("POST", "/v1/generate", headers, client=(peer, 40000))
    await limited.app(scope, Received(b"{}"), sent)
    return sent.status


async def test_a_forged_forwarded_address_is_ignored(limited: Limited) -> None:
    """Without trusted proxies X-Forwarded-For has no effect."""
    codes = [await _status(limited, "203.0.113.9", f"198.51.100.{i}") for i in range(6)]
    assert codes == [401] * 5 + [429]


async def test_a_trusted_proxys_forwarded_address_counts() -> None:
    """Each client behind a trusted proxy has a bucket, whatever addresses it forges."""
    limited = Limited(trusted_proxies=["10.0.0.0/8"])
    codes = [
        await _status(limited, "10.1.2.3", f"198.51.100.{i}, 203.0.113.7, 10.9.9.9")
        for i in range(6)
    ]
    assert codes == [401] * 5 + [429]
    assert await _status(limited, "10.1.2.3", "203.0.113.8") == 401
    # The same header from another address has no effect.
    assert [await _status(limited, "192.0.2.1", f"203.0.113.{i}") for i in range(6)][-1] == 429


def test_limits_that_are_off_let_everything_pass() -> None:
    """With rate_limit.enabled false nobody is limited."""
    client = TestClient(create_app(make_settings()), headers={"X-API-Key": API_KEY})
    codes = {client.post("/v1/generate", json=BODY).status_code for _ in range(30)}
    assert codes == {422}


def test_the_default_burst_is_a_minutes_worth() -> None:
    """Without burst_size a full bucket holds requests_per_minute tokens."""
    limits = {"enabled": True, "requests_per_minute": 3}
    client = TestClient(create_app(make_settings(rate_limit=limits)))
    headers = {"X-API-Key": API_KEY}
    codes = [client.post("/v1/chat", json=BODY, headers=headers).status_code for _ in range(4)]
    assert codes == [422, 422, 422, 429]


@pytest.mark.parametrize("value", ["true", "false"])
def test_the_librarys_own_variable_decides_nothing(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """The variable RATELIMIT_ENABLED, which slowapi reads by default, has no effect."""
    monkeypatch.setenv("RATELIMIT_ENABLED", value)
    limited = Limited()
    assert [limited.post().status_code for _ in range(6)] == [422] * 5 + [429]
