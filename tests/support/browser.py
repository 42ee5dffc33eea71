"""A real Chromium on the playground, and what its console said."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.service import API_KEY, Service

POOR = "key-of-a-caller-with-a-budget-of-one-token"
NAMES = ("chromium", "chromium-browser", "google-chrome")
WINDOW = {"width": 1280, "height": 800}
# Milliseconds between looks at a condition. By default each frame is one.
POLLING = 100
# Chromium reports an answer of 4xx or 5xx as an error; the page shows it too.
_EXPECTED = "Failed to load resource: the server responded with a status of"


def chromium() -> str:
    """The path of a Chromium; a test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no chromium (Debian: apt-get install chromium)")
    return found


@contextmanager
def running_browser() -> Iterator[Any]:
    """A browser; its sandbox is off for root, whom it would refuse."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=arguments)
        yield browser
        browser.close()


class Visitor:
    """A person in front of the playground, who begins without cookies, storage and key.

    A page of its own would cost each visitor a second of processor time, so one is handed on.

    Attributes:
        page: Playwright's page.
        complaints: What the console and failed scripts said, refusals of the service aside.
        hosts: Where requests went.
    """

    def __init__(self, browser: Any, service: Service, **options: Any) -> None:
        self.service = service
        # Animations would be painted sixty times a second.
        options = {"reduced_motion": "reduce", "viewport": WINDOW, **options}
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))

    def leave(self) -> None:
        """Forget all that the page kept, for the next visitor."""
        self.page.unroute_all(behavior="ignoreErrors")
        self.page.evaluate("() => { localStorage.clear(); sessionStorage.clear(); }")
        self.page.set_viewport_size(WINDOW)
        self.page.emulate_media(color_scheme="light")
        self.complaints.clear()
        self.hosts.clear()

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(_EXPECTED):
            self.complaints.append(message.text)

    def open(self, path: str = "/") -> None:
        """Open the page, and wait until its scripts have run."""
        self.page.goto(self.service.base_url + path)
        if path == "/":
            self.page.wait_for_selector("body[data-started]")

    def enter_key(self, key: str = API_KEY) -> None:
        """Enter a key in the open dialog."""
        self.page.fill("#key", key)
        self.page.press("#key", "Enter")

    def come_with_key(self, key: str = API_KEY) -> None:
        """Open the page and enter a key that the service accepts."""
        self.open()
        self.page.click("#key-button")
        self.enter_key(key)
        self.page.wait_for_selector("#key-dialog", state="hidden")

    def say(self, text: str, *, wait: bool = True, answers: int | None = None) -> None:
        """Send a message, and wait until there is its whole answer, the one after the others.

        ``answers`` is how many there are then, where it takes the place of one that failed.
        """
        before = self.page.locator(".message.assistant").count()
        self.page.fill("#message", text)
        self.page.press("#message", "Enter")
        if wait:
            self.wait_for_answers(answers or before + 1)

    def wait_for_answers(self, count: int) -> None:
        """Wait for so many answers, the last of which is complete."""
        self.page.wait_for_function(
            "n => document.querySelectorAll('.message.assistant').length === n"
            " && document.getElementById('send').textContent === 'Send'",
            arg=count,
            polling=POLLING,
        )

    def answer(self) -> str:
        """The text of the last answer."""
        text: str = self.page.locator(".message.assistant .prose").last.inner_text()
        return text.strip()

    def history(self) -> list[str]:
        """What the service keeps of the conversation that the page shows."""
        name = self.page.evaluate("JSON.parse(sessionStorage.getItem('playground.open'))")
        with self.service.client() as client:
            return [m["content"] for m in client.get(f"/v1/sessions/{name}").json()["messages"]]
