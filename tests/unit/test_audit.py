"""`make audit` succeeds only when every package was looked up."""

from collections.abc import Sequence
from typing import Any

import pytest

from scripts import audit

SOUND = {"name": "sound", "version": "1.0", "vulns": []}
BROKEN = {
    "name": "broken",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"], "aliases": ["CVE-1"]}],
}
SKIPPED = {"name": "odd", "skip_reason": "Dependency not found on PyPI"}


class Service:
    """A fake of pip-audit and its databases."""

    def __init__(self, answers: Sequence[dict[str, Any]] | None, knows: str = "osv") -> None:
        self._answers = answers
        self._knows = knows

    def __call__(self, service: str, requirements: Sequence[str]) -> list[dict[str, Any]] | None:
        if list(requirements) == [audit.KNOWN_VULNERABLE]:
            return [BROKEN] if service == self._knows else [SKIPPED]
        return None if self._answers is None else list(self._answers)


def run(service: Service, *, where_reachable: bool = False) -> int:
    """Audit two packages."""
    return audit.audit(["a==1", "b==2"], where_reachable=where_reachable, ask=service)


def test_sound_packages_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """With an answer for every package and no vulnerability it succeeds and names the service."""
    assert run(Service([SOUND, SOUND])) == 0
    assert "2 packages, no known vulnerability (osv)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answers", "line"),
    [
        ([SOUND, BROKEN], "broken 1.0: PYSEC-1, fixed in 1.1"),
        ([SOUND, SKIPPED], "odd: not audited: Dependency not found"),
        ([SOUND], "did not answer for every package"),
        (None, "did not answer for every package"),
    ],
    ids=["vulnerable", "skipped", "missing", "broken off"],
)
@pytest.mark.parametrize("where_reachable", [False, True])
def test_an_incomplete_audit_fails(
    answers: Any, line: str, where_reachable: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A vulnerability, a skipped package and an incomplete answer each fail the audit."""
    assert run(Service(answers), where_reachable=where_reachable) == 1
    printed = capsys.readouterr()
    assert line in printed.out + printed.err


def test_a_service_that_knows_nothing_is_not_believed(capsys: pytest.CaptureFixture[str]) -> None:
    """An audit by services that know no vulnerability fails; for check-all it only warns."""
    assert run(Service([SOUND, SOUND], knows="none")) == 2
    assert run(Service([SOUND, SOUND], knows="none"), where_reachable=True) == 0
    assert capsys.readouterr().err.count("NOT AUDITED") == 2


def test_every_locked_package_is_asked_for() -> None:
    """Every package of the lock file is looked up with its version."""
    requirements = audit.locked(audit.LOCK_FILE)
    assert len(requirements) > 100
    assert any(r.startswith("fastapi==0.") for r in requirements)
    assert all("==" in r for r in requirements)
