"""Finds the private names that one part of the code uses of another, without running it."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from tests.architecture import syntax

# Names with an underscore that their library's documentation describes: they are no secrets.
DOCUMENTED = {"_exit", "_replace", "_asdict", "_fields", "_make"}
# LangChain's documentation tells authors of models to define these.
EXTENSION_POINTS = {"_llm_type", "_generate", "_agenerate", "_stream", "_astream"}


class PrivateName(NamedTuple):
    """One private name of another library, and a file that uses it."""

    library: str
    name: str
    file: str


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__") and name not in {"_", *DOCUMENTED}


def find(folder: Path) -> list[PrivateName]:
    """Each private name of another library that a package uses, once, with its first file.

    Args:
        folder: The package's; it has the package's name.
    """
    modules = {path: _Module(path, folder.name) for path in sorted(folder.rglob("*.py"))}
    own = set().union(*(module.defined for module in modules.values()))
    found: dict[tuple[str, str], PrivateName] = {}
    for path, module in modules.items():
        file = str(path.relative_to(folder.parent))
        for library, name in module.uses(own):
            found.setdefault((library, name), PrivateName(library, name, file))
    return sorted(found.values(), key=lambda use: (use.file, use.library, use.name))


def find_in_tests(tests: Path, package: Path) -> list[str]:
    """Each place where a test uses a private name that the package defines, and it itself does not.

    Args:
        tests: The folder of the tests.
        package: The package's folder.
    """
    parsed = {path: _Module(path, package.name) for path in sorted(tests.rglob("*.py"))}
    theirs = set().union(*(_Module(path, "").defined for path in package.rglob("*.py")))
    return [
        f"{path.relative_to(tests.parent)}:{line}: {name}"
        for path, module in parsed.items()
        for others in [theirs - module.defined]
        for line, name in module.mentions()
        if name in others
    ]


class _Module:
    """One file of the package.

    Attributes:
        defined: The private names that it defines.
    """

    def __init__(self, path: Path, package: str) -> None:
        self._nodes = syntax.nodes(path)
        self._path = path
        self._package = package
        self.defined = _defined(self._nodes)

    def uses(self, own: set[str]) -> Iterator[tuple[str, str]]:
        """The private names of others, each with its library, its base class or "attribute"."""
        yield from self._imported()
        yield from self._overridden()
        for node in self._nodes:
            match node:
                case ast.Attribute(attr=name) if is_private(name) and name not in own:
                    yield "attribute", name
                case ast.Call(
                    func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"),
                    args=[_, ast.Constant(value=str(name)), *_],
                ) if is_private(name) and name not in own:
                    yield "attribute", name
                case ast.Subscript(
                    value=ast.Attribute(value=ast.Name(id="sys"), attr="modules"),
                    slice=ast.Constant(value=str(name)),
                    ctx=ast.Store(),
                ):
                    yield name.partition(".")[0], f"sys.modules[{name!r}]"

    def mentions(self) -> Iterator[tuple[int, str]]:
        """Names that are imported, that are attributes, and that a call is given as a string."""
        for node in self._nodes:
            match node:
                case ast.Attribute(attr=name, lineno=line):
                    yield line, name
                case ast.ImportFrom(names=aliases, lineno=line):
                    yield from ((line, alias.name) for alias in aliases)
                case ast.Call(args=arguments, lineno=line):
                    constants = (a.value for a in arguments if isinstance(a, ast.Constant))
                    yield from ((line, name) for name in constants if isinstance(name, str))

    def _imported(self) -> Iterator[tuple[str, str]]:
        for module, name in _imports(self._nodes):
            library = module.partition(".")[0]
            if library not in ("", self._package) and any(
                is_private(part) for part in f"{module}.{name}".split(".")
            ):
                yield library, f"{module}.{name}".rstrip(".")

    def _overridden(self) -> Iterator[tuple[str, str]]:
        """What the file's classes define that a base of another library has, too."""
        below = self._path.with_suffix("").parts[::-1]
        inside = below[: below.index(self._package) + 1][::-1]
        for node in self._nodes:
            if not isinstance(node, ast.ClassDef):
                continue
            mine = _defined(list(ast.walk(node))) - EXTENSION_POINTS
            for base in filter(None, map(_dotted, node.bases)) if mine else ():
                theirs = _names_of_class(".".join(inside), base, self._package) or frozenset()
                yield from ((base, name) for name in mine & theirs)


def _imports(nodes: list[ast.AST]) -> Iterator[tuple[str, str]]:
    """Each import: the module, and the name that is taken from it, if one is."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.module or "", alias.name) for alias in node.names)


def _defined(nodes: list[ast.AST]) -> set[str]:
    """The private names that a part of a file defines or assigns."""
    names: set[str] = set()
    for node in nodes:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
    return set(filter(is_private, names))


def _dotted(node: ast.expr) -> str | None:
    """``a.b`` for the expression a.b or a.b[c]."""
    if isinstance(node, ast.Subscript):
        return _dotted(node.value)
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return f"{inner}.{node.attr}" if inner else None
    return node.id if isinstance(node, ast.Name) else None


@cache
def _source(module: str) -> tuple[list[ast.AST], bool] | None:
    """Classes and imports of a library's module, and whether it is a package; none is imported."""
    origin, inside = None, None
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:end]), inside)
        if spec is None:
            return None
        origin, inside = spec.origin, spec.submodule_search_locations
    if origin is None or not origin.endswith(".py"):
        return None
    kinds = (ast.ClassDef, ast.Import, ast.ImportFrom)
    nodes: list[ast.AST] = [n for n in syntax.nodes(Path(origin)) if isinstance(n, kinds)]
    return nodes, inside is not None


@cache
def _names_of_class(module: str, name: str, without: str) -> frozenset[str] | None:
    """The private names of a class and its bases, without those that a package itself defines.

    Args:
        module: Where the class is defined or imported.
        name: Its name there, with dots where it is an attribute of another module.
        without: The package.

    Returns:
        ``None`` where the module has no such class.
    """
    found = _source(module)
    if found is None:
        return None
    nodes, is_package = found
    for node in nodes:
        if isinstance(node, ast.ClassDef) and node.name == name:
            own = set() if module.partition(".")[0] == without else _defined(list(ast.walk(node)))
            bases = [base for base in map(_dotted, node.bases) if base and base != name]
            return frozenset(own.union(*(_names_of_class(module, b, without) or () for b in bases)))
    for origin in _origins(nodes, module.split(".")[: module.count(".") + is_package], name):
        if (names := _names_of_class(*origin, without)) is not None:
            return names
    return None


def _origins(nodes: list[ast.AST], package: list[str], name: str) -> Iterator[tuple[str, str]]:
    """Where a module may have a class from: the modules, and the class's name in each."""
    first, _, rest = name.partition(".")
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                known = f"{alias.asname or alias.name}."
                if name.startswith(known):
                    yield alias.name, name.removeprefix(known)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join(filter(None, [*above, node.module]))
            for alias in node.names:
                if alias.name == "*":
                    yield origin, name
                elif (alias.asname or alias.name) == first:
                    yield (f"{origin}.{alias.name}", rest) if rest else (origin, alias.name)
