"""Make README.md and docs/ a site in build/docs/site: ``python -m scripts.docs_site``.

The pages stand in one folder as they stand in the project, so that their links work as they are.
A link that leads nowhere, or a page that is in no menu, is a fault.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BESIDE = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE"),
    "deploy/haproxy/haproxy.cfg",
)
"""The files outside docs/ that the site has."""

CHANGES = {
    # A site has no listing of a folder.
    "README.md": (r"\]\(docs/adr\)", "](docs/adr/index.md)"),
    # The theme would take the script that draws Mermaid from the internet.
    "docs/architecture.md": (
        r"(?s)```mermaid\n.*?```",
        "![The two processes](images/processes.svg)",
    ),
    # Versions are compared where the repository is.
    "CHANGELOG.md": (r"(?m)^\[[^]]+\]: \.\./\.\./.*$", ""),
}
"""What is otherwise on the site: a pattern, and what takes its place."""


def gather(folder: Path) -> None:
    """Copy the pages and mkdocs.yml into a folder, and write a list of the decisions there."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = folder / "pages"
    shutil.copytree(ROOT / "docs", pages / "docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    for name in BESIDE:
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, pages / name)
    for name, (pattern, replacement) in CHANGES.items():
        text = (pages / name).read_text(encoding="utf-8")
        (pages / name).write_text(re.sub(pattern, replacement, text), encoding="utf-8")
    rows = []
    for page in sorted((pages / "docs" / "adr").glob("*.md")):
        title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        rows.append(f"- [{title}]({page.name})\n")
    decisions = pages / "docs" / "adr" / "index.md"
    decisions.write_text("".join(["# Decisions\n\n", *rows]), encoding="utf-8")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build ``site`` in the folder from what was gathered there."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    # Its notice is about plans for MkDocs, not about this site.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def main() -> int:
    """Entry point; returns the exit status."""
    gather(ROOT / "build" / "docs")
    done = build(ROOT / "build" / "docs")
    print(done.stderr, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
