"""The documentation agrees with the code: routes, errors, metrics, settings, paths and tests."""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.metrics import MetricWrapperBase

from app.core.config import PROJECT_ROOT, Settings
from app.core.metrics import Metrics
from scripts import config_docs
from tests.contract.test_openapi import document, routes, service_errors
from tests.support.markdown import anchors, blocks, codes
from tests.support.service import setting_names

DOCS = PROJECT_ROOT / "docs"
README = PROJECT_ROOT / "README.md"
CONTRIBUTING = PROJECT_ROOT / "CONTRIBUTING.md"
API_DOC = DOCS / "api.md"
OPERATIONS = DOCS / "operations.md"
RELIABILITY = DOCS / "reliability.md"
DECISIONS = sorted((DOCS / "adr").glob("*.md"))
CHANGELOG = PROJECT_ROOT / "CHANGELOG.md"
SECURITY = PROJECT_ROOT / "SECURITY.md"
# The changelog is not among them, because it names what was removed.
PAGES = [README, CONTRIBUTING, *sorted(DOCS.rglob("*.md"))]

MAX_README_LINES = 350
MAX_DECISION_LINES = 60
MAX_DOCS_WORDS = 15_000

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def make_targets() -> set[str]:
    """The targets of the Makefile."""
    makefile = (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


@every_page
def test_make_targets_exist(page: Path) -> None:
    """Every `make` target that a page names exists."""
    in_blocks = "\n".join(b.code for b in blocks(page) if b.language == "bash")
    text = "\n".join([in_blocks, *codes(page)])
    named = re.findall(r"^(?:[A-Z_]+=\S+ )*make ([a-z][a-z-]*)", text, re.MULTILINE)
    assert set(named) - make_targets() == set()


@pytest.mark.parametrize("page", [*PAGES, CHANGELOG, SECURITY], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link inside the project leads to a file, and to a heading where it names one."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if heading:
            assert heading in anchors(file), target


@every_page
def test_paths_exist(page: Path) -> None:
    """Every path of the project that a page names exists."""
    folders = ("app/", "benchmarks/", "docs/", "deploy/", "scripts/", "tests/")
    in_blocks = [w for b in blocks(page) if b.language == "bash" for w in b.code.split()]
    named = {name for name in [*codes(page), *in_blocks] if name.startswith(folders)}
    named = {n for n in named if re.fullmatch(r"[\w./-]+", n)}
    assert sorted(n for n in named if not (PROJECT_ROOT / n).exists()) == []


@every_page
def test_tests_exist(page: Path) -> None:
    """Every test that a page names, as ``path::function``, exists."""
    named = {c for c in codes(page) if c.startswith("tests/") and "::" in c}
    missing = [
        name
        for name in sorted(named)
        for path, _, function in [name.partition("::")]
        if not (PROJECT_ROOT / path).is_file()
        or f"def {function}(" not in (PROJECT_ROOT / path).read_text(encoding="utf-8")
    ]
    assert missing == []


def test_every_risk_has_its_row() -> None:
    """docs/security.md has a row for each of OWASP's ten risks of both lists."""
    text = (DOCS / "security.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:API|LLM)\d+) ", text, re.MULTILINE)
    assert rows == [f"API{i}" for i in range(1, 11)] + [f"LLM{i:02}" for i in range(1, 11)]


def test_every_failure_is_shown_by_a_test() -> None:
    """docs/reliability.md has the twenty failure modes in order, and each row names a test."""
    rows = re.findall(r"^\| (\d+) \|(.*)", RELIABILITY.read_text(encoding="utf-8"), re.MULTILINE)
    numbers = [int(number) for number, _ in rows]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(1, 21))
    assert [row for _, row in rows if "`tests/" not in row or "::test_" not in row] == []


def test_pages_stay_short() -> None:
    """README, each decision record and docs/ as a whole keep to their lengths."""

    def lines(page: Path) -> int:
        return len(page.read_text(encoding="utf-8").splitlines())

    words = sum(len(page.read_text(encoding="utf-8").split()) for page in DOCS.glob("*.md"))
    assert lines(README) <= MAX_README_LINES
    assert [page.name for page in DECISIONS if lines(page) > MAX_DECISION_LINES] == []
    assert words <= MAX_DOCS_WORDS


@every_page
def test_settings_exist(page: Path) -> None:
    """Every setting that a page names, as a key or as a variable, exists."""
    variables = set(setting_names())
    keys = {name.lower().replace("__", ".") for name in variables}
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)*__[A-Z_]+\b", text))
    assert named - variables == set()
    sections = "|".join(Settings.model_fields)
    named = {c for c in codes(page) if re.fullmatch(rf"({sections})\.[a-z_]+", c)}
    assert named - keys - status_members() == set()


def status_members() -> set[str]:
    """The members of /status, such as ``engine.state``, which look like settings."""
    schemas = document()["components"]["schemas"]
    return {
        f"{name}.{member}"
        for name, field in schemas["StatusResponse"]["properties"].items()
        if "$ref" in field
        for member in schemas[field["$ref"].rpartition("/")[2]]["properties"]
    }


def test_every_route_is_described() -> None:
    """docs/api.md names exactly the routes that exist."""
    named = {c for c in codes(API_DOC) if re.fullmatch(r"(GET|POST|PUT|DELETE) /\S*", c)}
    assert named == routes()


def test_every_error_is_described() -> None:
    """The table of errors in docs/api.md has each error of the service under its status."""
    text = API_DOC.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d{3}) \| ([^|]+) \|", text, re.MULTILINE)
    described = {(int(s), code) for s, cell in rows for code in re.findall("`(.+?)`", cell)}
    assert described == {(e.status, e.code) for e in service_errors()}


def test_every_metric_is_described() -> None:
    """The table of metrics in docs/operations.md has each metric with its labels."""
    text = OPERATIONS.read_text(encoding="utf-8")
    described = {
        name: tuple(re.findall("`(.+?)`", labels))
        for names, labels in re.findall(r"^\| (`[a-z_`, ]+`) \|([^|]*)\|", text, re.MULTILINE)
        for name in re.findall("`(.+?)`", names)
        if re.search(r"^(http|llm|response_cache|chat|pii|rate|event|process)_|_total$", name)
    }
    assert described == metrics()


def metrics() -> dict[str, tuple[str, ...]]:
    """Every metric of the service, and its labels."""
    of_the_service = Metrics()
    of_the_service.add_engine_process(os.getpid)
    collectors: list[Any] = list(of_the_service.registry._collector_to_names)
    ours = [c for c in collectors if isinstance(c, MetricWrapperBase)]
    # Those of processes have no labels.
    others = [f for c in collectors if c not in ours for f in c.collect()]
    labels = {c._name: (c._type, tuple(c._labelnames)) for c in ours}
    labels |= {family.name: (family.type, ()) for family in others}
    return {
        name + ("_total" if kind == "counter" else ""): names
        for name, (kind, names) in labels.items()
    }


def test_the_settings_files_are_in_step() -> None:
    """docs/configuration.md, .env.example and config.yml have every setting with its default."""
    assert config_docs.faults() == []


@cache
def words_of_the_code() -> set[str]:
    """Every word of the application's files."""
    files = (PROJECT_ROOT / "app").rglob("*.py")
    return {w for file in files for w in re.findall(r"\w+", file.read_text(encoding="utf-8"))}


@pytest.mark.parametrize(
    "page", [DOCS / "architecture.md", CONTRIBUTING, *DECISIONS], ids=lambda p: p.name
)
def test_names_of_the_code_are_real(page: Path) -> None:
    """Every class and function that a page names occurs in the code."""
    names = [c for c in codes(page) if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", c)]
    named = [n for n in names if n.endswith("()") or re.search(r"[a-z][A-Z]|[a-z]_[a-z]", n)]
    missing = [n for n in named if not set(re.findall(r"\w+", n)) <= words_of_the_code()]
    assert missing == []


@pytest.mark.parametrize("page", DECISIONS, ids=lambda p: p.name)
def test_a_decision_is_complete(page: Path) -> None:
    """Each decision record has context, decision, consequences and alternatives."""
    headings = re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == ["Context", "Decision", "Consequences", "Alternatives"]
