"""The documentation's commands and code blocks run, and give what the pages say."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.core.config import PROJECT_ROOT, Settings
from tests.contract.test_openapi import routes
from tests.support.curl import Answered, run_curl
from tests.support.forked import ForkedProcess
from tests.support.markdown import Block, blocks, commands, tree_paths
from tests.support.service import API_KEY, Service, isolated_environment

README = PROJECT_ROOT / "README.md"
PAGES = [README, PROJECT_ROOT / "CONTRIBUTING.md", *sorted((PROJECT_ROOT / "docs").glob("*.md"))]
# The sections of the user's document, in its order.
SECTIONS = (
    *("Features", "Requirements", "Installation", "Configuration", "API Endpoints"),
    *("Docker Deployment", "Testing", "Code Quality", "Observability", "Security Features"),
    *("Project Structure", "Common Issues", "Development", "License", "Contributing", "Support"),
)

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@dataclass(frozen=True)
class Example:
    """A curl command of the README, and the answer that the README shows.

    Attributes:
        name: Its line in the page, and its number in the block.
        command: The command as it is written.
        status: From a comment before it, ``# 404: …``; otherwise 200.
        answer: The JSON block after it, if there is one.
    """

    name: str
    command: str
    status: int
    answer: Any


def of_language(language: str, pages: list[Path]) -> list[Any]:
    """The pages' blocks in a language, as parameters of a test."""
    return [
        pytest.param(block, id=f"{page.name} line {block.line}")
        for page in pages
        for block in blocks(page)
        if block.language == language
    ]


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
    """The answer to each example; they run in order, since some need a session made before."""
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
    """A curl command of the README gives the documented status and JSON members, in order."""
    answered = answers[example.name]
    assert answered.status == example.status, answered.body
    if example.answer is not None:
        given, shown = shape(json.loads(answered.body)), shape(example.answer)
        assert json.dumps(given) == json.dumps(shown)


def _template(match: re.Match[str]) -> str:
    kind = match[1]
    return f"/{kind}s/{{{kind if kind == 'model' else f'{kind}_id'}}}"


def test_every_route_has_a_curl_command() -> None:
    """The README shows how to call each method of each route, and no other."""
    shown = {
        (re.search(r"-X (\w+)", e.command) or ["", "GET"])[1]
        + " "
        + re.sub(
            "/(session|model|response)s/[^ ]+", _template, e.command.split("8000")[1].split()[0]
        )
        for e in EXAMPLES
    }
    assert shown == routes()


@needs_curl
def test_the_stream_is_as_documented(answers: dict[str, Answered]) -> None:
    """The streamed example's events have the members shown, and their pieces are the answer."""
    (streamed,) = (answers[e.name].body for e in EXAMPLES if '"stream": true' in e.command)
    (shown,) = (b.code for b in blocks(README) if b.code.startswith("data: "))
    first, *_, last = shown.replace("{…}", "{}").split("\n\n")[:-1]
    events = [line.removeprefix("data: ") for line in streamed.splitlines() if line]
    assert events.pop() == "[DONE]"
    parsed = [json.loads(event) for event in events]
    begun = json.loads(first.removeprefix("data: "))
    assert json.dumps(shape(parsed[0])) == json.dumps(shape(begun))
    assert list(parsed[-1]) == list(json.loads(last.removeprefix("data: ")))
    assert "".join(e["delta"].get("content", "") for e in parsed) == "Tell me a story"


@pytest.mark.parametrize("block", of_language("yaml", PAGES))
def test_yaml_blocks_are_configuration(block: Block) -> None:
    """A YAML block is accepted as config.yml; one of the README shows the defaults."""
    shown = Settings(_env_file=None, **yaml.safe_load(block.code))
    if block in blocks(README):
        assert shown == Settings(_env_file=None)


@pytest.mark.model
@pytest.mark.parametrize("block", of_language("python", PAGES))
def test_python_blocks_run(block: Block, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A Python block runs as it is and prints what its comments say."""
    code = block.code
    if (address := "http://localhost:8000") in code:
        # Only the service's address and key are replaced.
        service: Service = request.getfixturevalue("bundled_service")
        code = code.replace(address, service.base_url)
    program, output = tmp_path / "example.py", tmp_path / "output"
    program.write_text(code.replace("your-api-key-here", API_KEY), encoding="utf-8")
    settings = {"MODEL__SOURCE": "bundled", "MODEL__ENGINE": "auto", "LOGGING__LEVEL": "ERROR"}
    process = ForkedProcess([str(program)], isolated_environment(settings), output)
    try:
        status = process.wait(110)
    finally:
        process.kill()
    printed = output.read_text(encoding="utf-8")
    assert status == 0, printed
    said = re.findall(r'print\(.*#  ?"(.*)"', block.code)
    assert said
    assert printed.splitlines()[: len(said)] == said


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_can_be_parsed(page: Path) -> None:
    """Each JSON block of a page is JSON, and each block of commands is valid bash."""
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.code)
        # A placeholder such as <repository-url> would be a redirection.
        if block.language == "bash" and "<repository-url>" not in block.code:
            command = ["bash", "-n"]
            done = subprocess.run(
                command, input=block.code, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr


# --- Structure ------------------------------------------------------------------------------------


def test_the_sections_are_the_users() -> None:
    """The README has the sections of the user's document, in its order."""
    headings = re.findall(r"^## (.+)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert tuple(headings) == SECTIONS


def test_the_figures_at_the_top_are_measured() -> None:
    """The README's headline and its measured memory are the figures of docs/performance.md."""
    page = (PROJECT_ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    readme = README.read_text(encoding="utf-8")

    def rows(text: str, name: str) -> list[list[str]]:
        lines = re.findall(rf"^\| ?({re.escape(name)}(?:\|| \().*)\|$", text, re.MULTILINE)
        return [[cell.strip() for cell in line.split("|")] for line in lines]

    def speed(server: str, column: int) -> str:
        return rows(page, server)[0][column].split(" ")[0]

    servers = ("ours, openvino", "transformers serve", "llama-server")
    alone = [speed(server, 1) for server in ("ours, openvino", "llama-server")]
    (headline,) = re.findall(r"^\*\*\d+ tokens/s.*?\n\n", readme, re.MULTILINE | re.DOTALL)
    ours, *peers = (speed(server, 3) for server in servers)
    assert re.findall(r"\d+(?:\.\d+)?", headline) == [ours, "32", *peers, *alone]

    def gigabytes(text: str) -> str:
        mebibytes = sum(int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", text))
        return f"{mebibytes * 2**20 / 1e9:.1f} GB"

    (gemma,) = rows(readme, "google/gemma-2-2b-it")
    in_integers = [rows(page, f"ours, {name}")[0][4] for name in ("by default", "int4")]
    assert gemma[2] == " · ".join(gigabytes(text) for text in in_integers)
    (bundled,) = rows(readme, "SmolLM2-135M-Instruct")
    assert bundled[2].split(" · ")[0] == gigabytes(rows(page, "ours, openvino")[1][2])


def test_the_project_structure_is_there() -> None:
    """Every file and folder of the README's tree exists."""
    (tree,) = (b.code for b in blocks(README) if "├──" in b.code)
    assert sorted(p for p in tree_paths(tree) if not (PROJECT_ROOT / p).exists()) == []
