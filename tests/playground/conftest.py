"""One Chromium and one service for all tests of the pages.

They end with the package, because Playwright's event loop is in the way of asynchronous tests.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.browser import POOR, Visitor, running_browser
from tests.support.service import Service, running_service

STEP = 0.02


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """One Chromium for all tests."""
    with running_browser() as running:
        yield running


@pytest.fixture(scope="package")
def service() -> Iterator[Service]:
    """A service that takes 20 ms for a token."""
    keys = [{"name": "poor", "key": POOR, "daily_tokens": 1}]
    with running_service(
        ENGINE__ECHO_STEP_SECONDS=str(STEP), SECURITY__API_KEYS=json.dumps(keys)
    ) as running:
        yield running


@pytest.fixture(scope="package")
def tab(browser: Any, service: Service) -> Visitor:
    """The one page."""
    return Visitor(browser, service)


@pytest.fixture
def visitor(tab: Visitor) -> Iterator[Visitor]:
    """A new visitor, whose console is silent at the end: no violation of the policy, no error."""
    yield tab
    complaints, hosts = [*tab.complaints], {*tab.hosts}
    tab.leave()
    assert complaints == []
    assert len(hosts) == 1
