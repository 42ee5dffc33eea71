"""README.md is true: its commands and examples run, and give what it says they give."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from app.core.config import PROJECT_ROOT, Settings
from tests.contract.test_openapi import routes
from tests.support.curl import Answered, run_curl
from tests.support.markdown import Block, blocks, commands, tree_paths
from tests.support.service import API_KEY, Service, isolated_environment

README = PROJECT_ROOT / "README.md"

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@dataclass(frozen=True)
class Example:
    """A curl command, and what the page says about its answer.

    Attributes:
        name: Where it stands.
        command: As it is written.
        status: Documented in a comment before it, ``# 404: …``; else 200.
        answer: The JSON block that follows it, if one does.
    """

    name: str
    command: str
    status: int
    answer: Any


def of_language(language: str) -> list[Any]:
    """The README's blocks in a language, as parameters of a test."""
    return [pytest.param(b, id=f"line {b.line}") for b in blocks(README) if b.language == language]


def examples() -> list[Example]:
    """The README's curl commands, in order."""
    found = []
    all_blocks = blocks(README)
    for block, after in zip(all_blocks, [*all_blocks[1:], Block("", "", 0)], strict=True):
        curls = [c for c in commands(block.code) if c[0].startswith("curl ")]
        for number, (command, status) in enumerate(curls if block.language == "bash" else []):
            is_last = number == len(curls) - 1
            answer = json.loads(after.code) if is_last and after.language == "json" else None
            found.append(Example(f"line {block.line}, {number + 1}", command, status, answer))
    return found


EXAMPLES = examples()


@pytest.fixture(scope="module")
def answers(echo_service: Service) -> dict[str, Answered]:
    """What each example gave; all were run in order, since later ones build on earlier ones."""
    return {e.name: run_curl(echo_service, e.command) for e in EXAMPLES}


def shape(value: Any) -> Any:
    """The names in a JSON value, without its values."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value[:1]]
    return None


# --- Commands and examples ------------------------------------------------------------------------


@needs_curl
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_each_curl_command_gives_what_is_documented(
    answers: dict[str, Answered], example: Example
) -> None:
    """A curl command of the README gives the status and the JSON members it is said to give."""
    answered = answers[example.name]
    assert answered.status == example.status, answered.body
    if example.answer is not None:
        assert shape(json.loads(answered.body)) == shape(example.answer)


def _template(match: re.Match[str]) -> str:
    return {"session": "/sessions/{session_id}", "model": "/models/{model}"}[match[1]]


def test_every_route_has_a_curl_command() -> None:
    """The README shows how to call each method of each route."""
    shown = {
        (re.search(r"-X (\w+)", e.command) or ["", "GET"])[1]
        + " "
        + re.sub("/(session|model)s/[^ ]+", _template, e.command.split("8000")[1].split()[0])
        for e in EXAMPLES
    }
    assert routes() - shown == set()


@needs_curl
def test_the_stream_is_as_documented(answers: dict[str, Answered]) -> None:
    """The streamed example's events have the members shown, and their pieces are the answer."""
    (streamed,) = (answers[e.name].body for e in EXAMPLES if '"stream": true' in e.command)
    (shown,) = (b.code for b in blocks(README) if b.code.startswith("data: "))
    first, *_, last = shown.replace("{…}", "{}").split("\n\n")[:-1]
    events = [line.removeprefix("data: ") for line in streamed.splitlines() if line]
    assert events.pop() == "[DONE]"
    parsed = [json.loads(event) for event in events]
    assert shape(parsed[0]) == shape(json.loads(first.removeprefix("data: ")))
    assert parsed[-1].keys() == json.loads(last.removeprefix("data: ")).keys()
    assert "".join(e["delta"].get("content", "") for e in parsed) == "Tell me a story"


@pytest.mark.parametrize("block", of_language("json"))
def test_json_blocks_are_json(block: Block) -> None:
    """A JSON block of the README can be parsed."""
    json.loads(block.code)


@pytest.mark.parametrize("block", of_language("yaml"))
def test_yaml_blocks_are_the_defaults(block: Block) -> None:
    """A YAML block of the README is accepted as config.yml, and shows the defaults."""
    shown = yaml.safe_load(block.code)
    shown_settings = Settings(_env_file=None, **shown)
    assert shown_settings == Settings(_env_file=None)


@pytest.mark.model
@pytest.mark.parametrize("block", of_language("python"))
def test_python_blocks_run(block: Block, bundled_service: Service) -> None:
    """A Python block of the README runs as it stands and prints what its comments say."""
    # Only the service's address and key are the test's own.
    code = block.code.replace("http://localhost:8000", bundled_service.base_url)
    done = subprocess.run(
        [sys.executable, "-c", code.replace("your-api-key-here", API_KEY)],
        cwd=PROJECT_ROOT,
        env=isolated_environment({"MODEL__SOURCE": "bundled", "MODEL__ENGINE": "auto"}),
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(r'print\(.*#  ?"(.*)"', block.code)
    assert said
    assert done.stdout.splitlines()[: len(said)] == said


@pytest.mark.parametrize("block", of_language("bash"))
def test_bash_blocks_are_bash(block: Block) -> None:
    """A block of commands has no mistake in its syntax."""
    done = subprocess.run(
        ["bash", "-n"], input=block.code, capture_output=True, text=True, check=False
    )
    # A placeholder such as <repository-url> would be a redirection.
    assert done.returncode == 0 or "<repository-url>" in block.code, done.stderr


def test_the_readme_names_the_targets_people_need() -> None:
    """Every target that `make help` lists for daily work stands in the README."""
    text = README.read_text(encoding="utf-8")
    needed = ("demo", "test", "install", "run", "lint", "format", "type-check", "check-all")
    docker = ("build-docker", "run-docker", "logs", "test-docker")
    assert [t for t in (*needed, *docker) if f"make {t}" not in text] == []


def test_the_project_structure_is_there() -> None:
    """Every file and folder of the README's tree exists, and every module of the API is in it."""
    (tree,) = (b.code for b in blocks(README) if "├──" in b.code)
    shown = set(tree_paths(tree))
    assert sorted(p for p in shown if not (PROJECT_ROOT / p).exists()) == []
    routers = PROJECT_ROOT / "app" / "api" / "routers"
    present = {str(p.relative_to(PROJECT_ROOT)) for p in routers.glob("[a-z]*.py")}
    assert present - shown == set()
