"""The pages of the project name what there is, and all of it; the settings' files are in step."""

import re
from pathlib import Path
from typing import Any

import pytest

from app.core.config import PROJECT_ROOT, Settings
from app.core.metrics import Metrics
from scripts import config_docs
from tests.contract.test_openapi import document, routes, service_errors
from tests.support.markdown import anchors, blocks, codes
from tests.support.service import setting_names

README = PROJECT_ROOT / "README.md"
API_DOC = PROJECT_ROOT / "docs" / "api.md"
ARCHITECTURE = PROJECT_ROOT / "docs" / "architecture.md"
DECISIONS = sorted((PROJECT_ROOT / "docs" / "adr").glob("*.md"))
PAGES = [
    *(PROJECT_ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((PROJECT_ROOT / "docs").rglob("*.md")),
]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
both_references = pytest.mark.parametrize("page", [README, API_DOC], ids=lambda p: p.name)


def make_targets() -> set[str]:
    """What `make` can be asked for."""
    makefile = (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


@every_page
def test_make_targets_exist(page: Path) -> None:
    """Every `make` target that a page names is one."""
    in_blocks = "\n".join(b.code for b in blocks(page) if b.language == "bash")
    text = "\n".join([in_blocks, *codes(page)])
    named = re.findall(r"^(?:[A-Z_]+=\S+ )*make ([a-z][a-z-]*)", text, re.MULTILINE)
    assert set(named) - make_targets() == set()


@every_page
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
    """Every test that a page names, as pytest takes it, is one."""
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
    text = (PROJECT_ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:API|LLM)\d+) ", text, re.MULTILINE)
    assert rows == [f"API{i}" for i in range(1, 11)] + [f"LLM{i:02}" for i in range(1, 11)]


def test_every_failure_has_its_rows() -> None:
    """docs/reliability.md has rows for each of the failure modes, in their order."""
    text = (PROJECT_ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert rows == sorted(rows)
    assert set(rows) == set(range(1, 21))


@every_page
def test_settings_exist(page: Path) -> None:
    """Every setting that a page names, as a key or as a variable, is one."""
    variables = set(setting_names())
    keys = {name.lower().replace("__", ".") for name in variables}
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)*__[A-Z_]+\b", text))
    assert named - variables == set()
    sections = "|".join(Settings.model_fields)
    named = {c for c in codes(page) if re.fullmatch(rf"({sections})\.[a-z_]+", c)}
    assert named - keys - status_members() == set()


def status_members() -> set[str]:
    """What /status answers with, such as ``engine.state``; sections of both have equal names."""
    schemas = document()["components"]["schemas"]
    return {
        f"{name}.{member}"
        for name, field in schemas["StatusResponse"]["properties"].items()
        if "$ref" in field
        for member in schemas[field["$ref"].rpartition("/")[2]]["properties"]
    }


@both_references
def test_every_route_is_described(page: Path) -> None:
    """The pages name exactly the routes there are."""
    named = {c for c in codes(page) if re.fullmatch(r"(GET|POST|PUT|DELETE) /\S*", c)}
    assert named - {"GET /docs", "GET /openapi.json"} == routes()


@both_references
def test_every_error_is_described(page: Path) -> None:
    """The pages' tables of errors have each error of the service under its status, no other."""
    rows = re.findall(r"^\| (\d{3}) \| ([^|]+) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    described = {(int(s), code) for s, cell in rows for code in re.findall("`(.+?)`", cell)}
    assert described == {(e.status, e.code) for e in service_errors()}


@both_references
def test_every_metric_is_described(page: Path) -> None:
    """The pages' tables of metrics have each metric with its labels, no other."""
    text = page.read_text(encoding="utf-8")
    described = {
        name: tuple(re.findall("`(.+?)`", labels))
        for names, labels in re.findall(r"^\| (`[a-z_`, ]+`) \|([^|]*)\|", text, re.MULTILINE)
        for name in re.findall("`(.+?)`", names)
        if re.search(r"^(http|llm|response_cache|chat|pii|rate|event)_|_total$", name)
    }
    assert described == metrics()


def metrics() -> dict[str, tuple[str, ...]]:
    """Every metric of the service, and its labels."""
    collectors: list[Any] = list(Metrics().registry._collector_to_names)
    return {
        c._name + ("_total" if c._type == "counter" else ""): tuple(c._labelnames)
        for c in collectors
    }


# --- Configuration --------------------------------------------------------------------------------


def test_the_settings_files_are_in_step() -> None:
    """docs/configuration.md, .env.example and config.yml have every setting with its default."""
    assert config_docs.faults() == []


# --- The other pages ------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [ARCHITECTURE, *DECISIONS], ids=lambda p: p.name)
def test_names_of_the_code_are_real(page: Path) -> None:
    """Every class and function that a page names stands in the code."""
    source = "\n".join(p.read_text(encoding="utf-8") for p in (PROJECT_ROOT / "app").rglob("*.py"))
    words = set(re.findall(r"\w+", source))
    names = [c for c in codes(page) if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", c)]
    named = [n for n in names if n.endswith("()") or re.search(r"[a-z][A-Z]|[a-z]_[a-z]", n)]
    missing = [n for n in named if not set(re.findall(r"\w+", n)) <= words]
    assert missing == []


@pytest.mark.parametrize("page", DECISIONS, ids=lambda p: p.name)
def test_a_decision_is_complete(page: Path) -> None:
    """Each decision record says context, decision, consequences and alternatives."""
    headings = re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert headings == ["Context", "Decision", "Consequences", "Alternatives"]


def test_the_changelog_has_this_version() -> None:
    """The changelog has an entry for the version that pyproject.toml declares."""
    project = (PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    assert version
    changelog = (PROJECT_ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{version[1]}]" in changelog
