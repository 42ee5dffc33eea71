"""Print what CHANGELOG.md says of a release: `python -m scripts.release_notes v1.2.3`.

The release of a tag runs it first. It fails with one line where the tag, a version in the project
and the changelog do not agree. Needs the standard library only.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Where the project says its version.
VERSIONS = {
    "pyproject.toml": r'^version = "(.+)"$',
    "app/__init__.py": r'^__version__ = "(.+)"$',
    "Dockerfile": r"^ARG VERSION=(.+)$",
}


class ReleaseError(Exception):
    """There is something to mend before the release."""


def release_notes(tag: str, root: Path = ROOT) -> str:
    """The changelog's text on the release of a tag.

    Raises:
        ReleaseError: The tag, the project and the changelog do not agree.
    """
    version = tag.removeprefix("v")
    for name, pattern in VERSIONS.items():
        found = re.search(pattern, (root / name).read_text(encoding="utf-8"), re.MULTILINE)
        if found is None or found[1] != version:
            raise ReleaseError(f"{name} has the version {found and found[1]}, the tag {version}")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n"
    text = r"(.*?)(?=^## |^\[[^\]]+\]: |\Z)"
    section = re.search(heading + text, changelog, re.MULTILINE | re.DOTALL)
    if section is None or not section[1].strip():
        raise ReleaseError(f"CHANGELOG.md has no dated section [{version}] with a text")
    return section[1].strip() + "\n"


def main() -> int:
    """The command."""
    try:
        print(release_notes(sys.argv[1]), end="")
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
