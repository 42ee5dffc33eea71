"""Guesses of keys over real sockets are counted by address, whatever a header says."""

from collections.abc import Iterator

import pytest

from tests.support.raw import KEY, Answer, RawClient, post
from tests.support.service import Service, running_service

PROXY = "127.0.0.9"
BURST = 5
# A body that is announced and never sent: a service that waits for it never answers.
UNSENT = "Content-Length: 1000000"


@pytest.fixture(scope="module")
def limited() -> Iterator[Service]:
    """A service that allows each address five guesses, and then one a minute."""
    with running_service(
        RATE_LIMIT__ENABLED="true",
        RATE_LIMIT__REQUESTS_PER_MINUTE="1",
        RATE_LIMIT__BURST_SIZE=str(BURST),
        SECURITY__TRUSTED_PROXIES=f'["{PROXY}"]',
    ) as service:
        yield service


def guess(service: Service, number: int, *headers: str, source: str) -> Answer:
    """Send a wrong key, and announce a body that never comes."""
    with RawClient(service, source=source) as client:
        return client.ask(post(f"X-API-Key: wrong-{number}", UNSENT, *headers))


def test_guesses_are_refused_before_their_body_is_read(limited: Service) -> None:
    """The sixth guess of an address is 429; other addresses and the right key are let in."""
    counted = limited.metric("rate_limited_total", reason="ip")
    answers = [guess(limited, i, source="127.0.0.2") for i in range(BURST + 3)]
    assert [a.status for a in answers] == [401] * BURST + [429] * 3
    assert answers[-1].code == "rate_limit_exceeded"
    assert 50 <= int(answers[-1].headers["retry-after"]) <= 60
    assert limited.metric("rate_limited_total", reason="ip") == counted + 3
    assert guess(limited, 0, source="127.0.0.4").status == 401
    with RawClient(limited, source="127.0.0.2") as client:
        body = b'{"prompt": "a"}'
        right = post(KEY, f"Content-Length: {len(body)}", body=body)
        assert client.ask(right).status == 200


# uvicorn by default trusts every client that connects from 127.0.0.1.
@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.3"])
def test_a_forged_address_is_no_other_address(limited: Service, source: str) -> None:
    """A new X-Forwarded-For with each guess does not raise the limit."""
    statuses = []
    for i in range(BURST + 1):
        forged = f"X-Forwarded-For: 198.51.100.{i}"
        statuses.append(guess(limited, i, forged, source=source).status)
    assert statuses == [401] * BURST + [429]


def test_a_trusted_proxy_is_believed(limited: Service) -> None:
    """Each client of a trusted proxy has a limit, by the last address of X-Forwarded-For."""
    statuses = []
    for i in range(BURST + 1):
        told = f"X-Forwarded-For: 198.51.100.{i}, 203.0.113.7"
        statuses.append(guess(limited, i, told, source=PROXY).status)
    assert statuses == [401] * BURST + [429]
    assert guess(limited, 9, "X-Forwarded-For: 203.0.113.8", source=PROXY).status == 401
