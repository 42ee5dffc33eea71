"""The pages for browsers as files: which are served, to whom, and under which policy."""

import hashlib
import re
import zlib
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import app.api.pages
from app.api.pages.routes import POLICY
from app.main import create_app
from tests.api.test_errors import check_error
from tests.conftest import make_settings, without_key
from tests.support.settings import Load

FOLDER = Path(app.api.pages.__file__).parent
VENDORED = re.findall(
    r"^\| `(.+?)` \| .+? \| `([0-9a-f]{64})` \| `(.+?)` \|",
    (FOLDER / "VENDORED.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
OURS = [p for p in FOLDER.rglob("*.*") if p.suffix in (".js", ".css", ".html", ".gz")]
OURS = [p for p in OURS if p.parent.name != "vendor"]


def unpacked(path: Path) -> bytes:
    """A file's content; a packed one's is what is in it."""
    data = path.read_bytes()
    return zlib.decompress(data, wbits=31) if path.suffix == ".gz" else data


def test_every_file_is_served_without_a_key(client: TestClient) -> None:
    """The pages and all their files are public, of the right type, under the strict policy."""
    anonymous = without_key(client)
    kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
    for page, folder in (("/", "playground"), ("/docs", "docs")):
        root = FOLDER / folder
        names = [p for p in root.rglob("*") if p.suffix in (*kinds, ".gz")]
        assert len(names) > 2
        for path in names:
            name = path.relative_to(root).as_posix().removesuffix(".gz")
            address = page if name == "index.html" else f"/{folder}/{name}"
            response = anonymous.get(address)
            assert response.content == unpacked(path)
            assert response.headers["content-type"].startswith(kinds[Path(name).suffix])
            assert response.headers["content-security-policy"] == POLICY
            assert anonymous.head(address).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["nothing.js", "%2e%2e/routes.py", "..%2froutes.py", "vendor", "vendor/marked.LICENSE", ""],
)
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    """Only the files of a page have addresses; no path leads out of their folder."""
    check_error(client.get(f"/playground/{name}"), 404, "not_found")
    check_error(client.get(f"/docs/{name or 'x'}"), 404, "not_found")


def test_the_playground_is_small() -> None:
    """All that the playground loads is under 200 KB, licences included."""
    files = [p for p in (FOLDER / "playground").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 200_000


def test_what_is_vendored_is_what_was_published() -> None:
    """Each vendored file has its published digest, and its licence beside it."""
    listed = {name: (digest, licence) for name, digest, licence in VENDORED}
    found = [p for p in FOLDER.rglob("vendor/*") if p.suffix in (".js", ".gz")]
    assert {p.relative_to(FOLDER).as_posix() for p in found} == listed.keys()
    for path in found:
        digest, licence = listed[path.relative_to(FOLDER).as_posix()]
        assert hashlib.sha256(unpacked(path)).hexdigest() == digest
        assert "icense" in (path.parent / licence).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.name)
def test_pages_hold_no_script_or_style_and_are_short(path: Path) -> None:
    """The policy forbids inline scripts, styles and handlers, so that no file of ours has any."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    assert not re.search(r"<script>|<style|\sstyle=|\son[a-z]+=[\"']|innerHTML|\beval\(", text)
    assert not re.search(r"(src|href)=\"https?:|@import|\burl\(", text)


@pytest.mark.parametrize(
    ("environment", "playground", "served"),
    [
        ("development", "auto", True),
        ("development", "false", False),
        ("production", "auto", False),
        ("production", "true", True),
    ],
)
def test_the_setting_decides(load: Load, environment: str, playground: str, served: bool) -> None:
    """`app.playground` is true, false, or auto: in development only."""
    key = "k" * 32
    settings = load(
        f"app:\n  environment: {environment}\n  playground: {playground}\n"
        f"security:\n  api_key: {key}\nmodel:\n  engine: echo\n"
    )
    client = TestClient(create_app(settings))
    for path in ("/", "/playground/app.js"):
        assert (client.get(path).status_code == 200) is served


def test_the_pages_are_in_no_document() -> None:
    """The OpenAPI document lists neither the pages nor their files."""
    paths = create_app(make_settings()).openapi()["paths"]
    assert not [path for path in paths if path.startswith(("/docs", "/playground")) or path == "/"]
