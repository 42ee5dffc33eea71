"""A release is made only where the tag, the project and the changelog agree."""

import shutil
from pathlib import Path

import pytest

from app import __version__
from scripts.release_notes import ROOT, VERSIONS, ReleaseError, release_notes


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the files that a release reads."""
    for name in (*VERSIONS, "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_this_version_has_its_section() -> None:
    """The project, the package and the image have one version, which the changelog describes."""
    notes = release_notes(f"v{__version__}")
    assert notes.startswith("### ")
    assert "\n## " not in notes


@pytest.mark.parametrize("name", VERSIONS)
def test_another_version_is_refused(project: Path, name: str) -> None:
    """A tag is refused where a file has another version, and the file is named."""
    text = (project / name).read_text(encoding="utf-8")
    (project / name).write_text(text.replace(__version__, "9.9.9"), encoding="utf-8")
    with pytest.raises(ReleaseError, match=rf"{name} has the version 9\.9\.9"):
        release_notes(f"v{__version__}", project)


def test_a_missing_section_is_refused(project: Path) -> None:
    """A tag is refused without a dated section that says something."""
    changelog = project / "CHANGELOG.md"
    for text in (
        "",
        f"## [{__version__}]\n\n- x\n",
        f"## [{__version__}] - 2026-11-27\n\n[x]: y\n",
    ):
        changelog.write_text(text, encoding="utf-8")
        with pytest.raises(ReleaseError, match=r"CHANGELOG\.md"):
            release_notes(f"v{__version__}", project)


def test_the_section_ends_before_the_next(project: Path) -> None:
    """The text is that of the one section, without its neighbours and the links."""
    text = (
        f"## [9.9.9] - 2027-01-01\n\n- b\n\n## [{__version__}] - 2026-11-27\n\n- a\n\n[9.9.9]: x\n"
    )
    (project / "CHANGELOG.md").write_text(text, encoding="utf-8")
    assert release_notes(f"v{__version__}", project) == "- a\n"
