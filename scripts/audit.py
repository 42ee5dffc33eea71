"""Look every locked package up in a database of known vulnerabilities.

pip-audit does the look-ups. With a package index that has no such database, such as many mirrors,
it skips every package and succeeds. So this script first looks up a package that is known to be
vulnerable, and uses only a service that reports it. A package that this service then skips is a
fault.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCK_FILE = ROOT / "poetry.lock"

SERVICES = ("pypi", "osv")
# An old version with many advisories, which will not be withdrawn.
KNOWN_VULNERABLE = "django==3.0"
_SECONDS_EACH = 900

Ask = Callable[[str, Sequence[str]], list[dict[str, Any]] | None]
"""Looks requirements up in a service; ``None`` when it does not answer."""


def locked(lock_file: Path) -> list[str]:
    """The packages of a poetry.lock, such as ``jinja2==3.1.6``."""
    packages = tomllib.loads(lock_file.read_text(encoding="utf-8"))["package"]
    return sorted(f"{package['name']}=={package['version']}" for package in packages)


def ask_pip_audit(service: str, requirements: Sequence[str]) -> list[dict[str, Any]] | None:
    """Look requirements up by pip-audit; one result for each requirement."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text("\n".join(requirements), encoding="utf-8")
        command = [sys.executable, "-m", "pip_audit", "--vulnerability-service", service]
        options = ["--format", "json", "--progress-spinner", "off", "--no-deps", "--disable-pip"]
        try:
            done = subprocess.run(
                [*command, *options, "--requirement", str(file)],
                capture_output=True,
                text=True,
                check=False,
                timeout=_SECONDS_EACH,
            )
            found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
        except (ValueError, KeyError, subprocess.TimeoutExpired):
            return None
    return found


def faults_of(packages: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each vulnerability, and for each package that was skipped."""
    faults = []
    for package in packages:
        if reason := package.get("skip_reason"):
            faults.append(f"{package['name']}: not audited: {reason}")
        for vulnerability in package.get("vulns", ()):
            fixed = ", ".join(vulnerability["fix_versions"]) or "no version"
            name = f"{package['name']} {package['version']}"
            faults.append(f"{name}: {vulnerability['id']}, fixed in {fixed}")
    return faults


def believable(ask: Ask) -> str | None:
    """The first service that reports the known vulnerability."""
    for service in SERVICES:
        answer = ask(service, [KNOWN_VULNERABLE])
        if answer and answer[0].get("vulns"):
            return service
    return None


def audit(requirements: Sequence[str], *, where_reachable: bool, ask: Ask = ask_pip_audit) -> int:
    """Print vulnerabilities; returns the exit status.

    Args:
        requirements: Packages with their versions.
        where_reachable: Only print a warning when no service can be reached.
        ask: See :data:`Ask`.
    """
    service = believable(ask)
    if service is None:
        print(
            f"NOT AUDITED: none of {', '.join(SERVICES)} can be reached, or has no database of "
            f"vulnerabilities. {len(requirements)} locked packages were looked up nowhere; "
            "run `make audit` where the network allows it.",
            file=sys.stderr,
        )
        return 0 if where_reachable else 2
    packages = ask(service, requirements)
    if packages is None or len(packages) != len(requirements):
        print(f"{service} did not answer for every package", file=sys.stderr)
        return 1
    faults = faults_of(packages)
    print("\n".join(faults) or f"{len(packages)} packages, no known vulnerability ({service})")
    return 1 if faults else 0


def main() -> int:
    """Audit poetry.lock and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--where-reachable",
        action="store_true",
        help="only print a warning when no service answers",
    )
    return audit(locked(LOCK_FILE), where_reachable=parser.parse_args().where_reachable)


if __name__ == "__main__":
    sys.exit(main())
