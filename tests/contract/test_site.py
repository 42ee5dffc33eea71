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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site's pages."""
    folder = tmp_path_factory.mktemp("site")
    gather(folder)
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_the_site_is_built(site: Path) -> None:
    """Every page is in a menu or in the list of decisions, and every link leads somewhere."""
    models = (site / "docs" / "models" / "index.html").read_text(encoding="utf-8")
    assert "llama*, " in models


def test_the_site_needs_no_other_server(site: Path) -> None:
    """No page loads a script, a style or a picture from elsewhere, the diagram's neither."""
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert len(pages) > 20
    loaded = r"<(?:script|img|iframe)\b[^>]*\bsrc=[^>]*|<link\b[^>]*stylesheet[^>]*"
    for text in pages.values():
        assert [tag for tag in re.findall(loaded, text) if "//" in tag] == []
    assert "mermaid" not in pages[site / "docs" / "architecture" / "index.html"]


def test_the_drawing_is_that_of_the_diagram() -> None:
    """The site's picture of the two processes was made of the text that GitHub draws."""
    page = (PROJECT_ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (diagram,) = re.findall(r"(?s)```mermaid\n(.*?)```", page)
    picture = (PROJECT_ROOT / "docs" / "images" / "processes.svg").read_text(encoding="utf-8")
    digest = hashlib.sha256(diagram.encode()).hexdigest()
    assert digest in picture, f"draw it anew (mermaid.live), with <desc>{digest}</desc>"


def test_a_lost_page_and_a_broken_link_are_faults(tmp_path: Path) -> None:
    """A page in no menu, and links to a missing heading and a missing file, fail the build."""
    gather(tmp_path)
    links = "[a](api.md#no-such-heading) [b](no-such-page.md)"
    (tmp_path / "pages" / "docs" / "lost.md").write_text(f"# Lost\n\n{links}\n", encoding="utf-8")
    done = build(tmp_path)
    assert done.returncode == 1
    for fault in ("docs/lost.md\n", "#no-such-heading", "no-such-page.md"):
        assert fault in done.stderr
