"""Continuous integration runs what the project says that it runs."""

import re
import subprocess
from typing import Any

import pytest
import yaml

from app.core.config import PROJECT_ROOT, Settings
from tests.contract.test_docs import make_targets

MAKEFILE = (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    """The jobs of the workflow."""
    text = (PROJECT_ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text)["jobs"]
    return found


def test_every_supported_python_is_checked(jobs: dict[str, Any]) -> None:
    """The matrix has exactly the Pythons that pyproject.toml allows."""
    project = (PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', project)
    assert bounds
    supported = [f"3.{minor}" for minor in range(int(bounds[1]), int(bounds[2]))]
    assert jobs["checks"]["strategy"]["matrix"]["python"] == supported


def test_the_jobs_run_the_projects_own_commands(jobs: dict[str, Any]) -> None:
    """Targets and scripts of the steps exist, and all checks and the image's are among them."""
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = {target for run in runs for target in re.findall(r"make ([a-z-]+)", run)}
    assert targets <= make_targets()
    assert "test-docker" in targets
    assert ".ci/run" in runs
    for module in re.findall(r"-m (scripts\.\w+)", "\n".join(runs)):
        assert (PROJECT_ROOT / f"{module.replace('.', '/')}.py").is_file()


def test_only_the_release_may_write(jobs: dict[str, Any]) -> None:
    """No job but the release has rights beyond reading, and it runs for tags alone."""
    assert [name for name, job in jobs.items() if "permissions" in job] == ["release"]
    assert jobs["release"]["if"] == "github.ref_type == 'tag'"
    assert jobs["release"]["needs"] == "checks"


def test_the_hooks_are_checks_of_ci() -> None:
    """Each pre-commit hook is a target of check-all, and each target is a hook, but the audit."""
    config = (PROJECT_ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    (repo,) = yaml.safe_load(config)["repos"]
    hooks = {hook["entry"].removeprefix("make ") for hook in repo["hooks"]}
    checks = re.search(r"^check-all: ([a-z -]+) ##", MAKEFILE, re.MULTILINE)
    assert checks
    assert hooks == set(checks[1].split()) - {"audit"}


def test_a_targets_arguments_are_no_settings() -> None:
    """What is given to `make export-openvino` does not reach the service's settings as MODEL."""
    stamp = re.search(r"^INSTALL_STAMP := (\S+)", MAKEFILE, re.MULTILINE)
    assert stamp
    done = subprocess.run(
        # Its command becomes one that shows the environment.
        ["make", "--old-file", stamp[1], "RUN=env; :", "export-openvino", "MODEL=a/b", "OUTPUT=c"],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert "PATH" in names
    assert not names & {name.upper() for name in Settings.model_fields} - {"HUGGINGFACE_TOKEN"}
