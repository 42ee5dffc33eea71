"""Reads the syntax of Python files, each once for all tests of this folder."""

import ast
from functools import cache
from pathlib import Path


@cache
def tree(path: Path) -> ast.Module:
    """The module of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Every node of a file, but for those that only say how a name is used.

    The order is that of :func:`ast.walk`, which takes three times as long.
    """
    found: list[ast.AST] = [tree(path)]
    # The list grows while it is read.
    for node in found:
        for value in vars(node).values():
            if isinstance(value, list):
                found += [one for one in value if isinstance(one, ast.AST)]
            elif isinstance(value, ast.AST) and not isinstance(value, ast.expr_context):
                found.append(value)
    return found
