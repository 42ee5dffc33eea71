"""``make screenshots``: pictures of the playground with the bundled model, into docs/images.

One is light, one dark, and one that of a phone.
"""

from pathlib import Path
from typing import Any, Final

from app.core.config import PROJECT_ROOT
from tests.support.browser import Visitor, running_browser
from tests.support.service import Service, running_service

FOLDER: Final = PROJECT_ROOT / "docs" / "images"
WIDE: Final = {"width": 1360, "height": 850}
PHONE: Final = {"width": 390, "height": 780}
MOST_BYTES: Final = 150_000
EARLIER: Final = ("Name three colours.", "How does photosynthesis work?")
QUESTIONS: Final = (
    "What is the capital of France?",
    "Show me in Python how to reverse a string.",
)


def talk(visitor: Visitor) -> None:
    """Three short conversations, of likeliest tokens."""
    visitor.page.set_default_timeout(120_000)
    visitor.page.add_init_script(
        """sessionStorage.setItem("playground.settings", '{"temperature": "0"}')"""
    )
    visitor.come_with_key()
    for question in EARLIER:
        visitor.say(question)
        # On a phone the button is in a drawer.
        visitor.page.dispatch_event("#new", "click")
    for question in QUESTIONS:
        visitor.say(question)


def take(browser: Any, service: Service, name: str, scheme: str, **options: Any) -> None:
    """Take one picture."""
    visitor = Visitor(browser, service, color_scheme=scheme, **options)
    talk(visitor)
    visitor.page.mouse.move(0, 0)
    path = FOLDER / f"playground-{name}.png"
    visitor.page.screenshot(path=path, animations="disabled")
    visitor.context.close()
    report(path)


def report(path: Path) -> None:
    """Say what a picture weighs, and fail where it is too much for a page."""
    size = path.stat().st_size
    print(f"{path.relative_to(PROJECT_ROOT)}: {size / 1000:.0f} kB")  # noqa: T201
    assert size < MOST_BYTES, "too large for a page"


def main() -> None:
    """Take the pictures."""
    settings = {"MODEL__SOURCE": "bundled", "MODEL__ENGINE": "auto", "CACHE__ENABLED": "false"}
    with running_service(interpreter="new", **settings) as service, running_browser() as browser:
        take(browser, service, "light", "light", viewport=WIDE)
        take(browser, service, "dark", "dark", viewport=WIDE)
        take(browser, service, "phone", "light", viewport=PHONE, device_scale_factor=1.5)


if __name__ == "__main__":
    main()
