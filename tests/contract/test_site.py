"""README.md and docs/ as a site, which `make docs` builds."""

import hashlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from app.core.config import PROJECT_ROOT
from scripts.docs_site import build, gather

pytestmark = pytest.mark.skipif(
    find_spec("mkdocs") is None, reason="mkdocs-material is not installed (make install)"
)


def test_the_site_is_built(tmp_path: Path) -> None:
    """Every page is in a menu or in the list of decisions, and every link leads somewhere."""
    gather(tmp_path)
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    models = (tmp_path / "site" / "docs" / "models" / "index.html").read_text(encoding="utf-8")
    assert "llama*, " in models


def test_the_site_needs_no_other_server(tmp_path: Path) -> None:
    """No page loads a script, a style, a font or a picture from elsewhere."""
    gather(tmp_path)
    build(tmp_path)
    pages = [*(tmp_path / "site").rglob("*.html")]
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//[^\s>]*", text) == []
        styles = re.findall(r"<link[^>]*>", text)
        assert [s for s in styles if "stylesheet" in s and "//" in s] == []
        assert "mermaid" not in text or page.parent.name != "architecture"


def test_the_drawing_is_that_of_the_diagram() -> None:
    """The site's picture of the two processes was made of the text that GitHub draws."""
    page = (PROJECT_ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (diagram,) = re.findall(r"(?s)```mermaid\n(.*?)```", page)
    picture = (PROJECT_ROOT / "docs" / "images" / "processes.svg").read_text(encoding="utf-8")
    assert hashlib.sha256(diagram.encode()).hexdigest() in picture


def test_a_lost_page_and_a_broken_link_are_faults(tmp_path: Path) -> None:
    """A page in no menu, and links to a missing heading and a missing file, fail the build."""
    gather(tmp_path)
    links = "[a](api.md#no-such-heading) [b](no-such-page.md)"
    (tmp_path / "pages" / "docs" / "lost.md").write_text(f"# Lost\n\n{links}\n", encoding="utf-8")
    done = build(tmp_path)
    assert done.returncode == 1
    for fault in ("docs/lost.md\n", "#no-such-heading", "no-such-page.md"):
        assert fault in done.stderr
