"""Parsing of the project's Markdown pages: code blocks, commands, names, headings and trees."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    language: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    """Every block of code of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1], match[2], text.count("\n", 0, match.start()) + 1)
        for match in _BLOCK.finditer(text)
    ]


def commands(code: str) -> Iterator[tuple[str, int]]:
    """Each command of a block, and its status: from a comment before it (``# 404``), or 200."""
    pending, status = "", 200
    for line in code.splitlines():
        if not pending and line.startswith("#"):
            documented = re.match(r"# (\d{3})\b", line)
            status = int(documented[1]) if documented else 200
            continue
        pending += f"{line}\n"
        if line.endswith("\\") or not _is_closed(pending):
            continue
        if pending.strip():
            yield pending.strip(), status
        pending, status = "", 200
    assert not pending, f"a command without an end: {pending}"


def _is_closed(command: str) -> bool:
    try:
        shlex.split(command)
    except ValueError:
        return False
    return True


def prose(page: Path) -> str:
    """A page's text without its blocks of code."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def codes(page: Path) -> list[str]:
    """The text between backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub derives from a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


def tree_paths(tree: str) -> Iterator[str]:
    """The paths in a drawn tree of files, relative to its first line."""
    parents: list[str] = []
    for line in tree.splitlines()[1:]:
        if drawn := re.match(r"([│ ]*)[├└]── (\S+)", line):
            depth = len(drawn[1]) // 4
            parents[depth:] = [drawn[2].rstrip("/")]
            yield "/".join(parents)
