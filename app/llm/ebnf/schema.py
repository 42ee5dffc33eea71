"""Translates JSON Schema to EBNF.

Every answer of the grammar is valid under the schema, but not the reverse: answers are JSON on one
line, with properties in the order of the schema and no unlisted ones. A schema that cannot be
translated in full raises :class:`GrammarError`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from app.llm.ebnf import automaton, keywords, numbers, regex, strings
from app.llm.ebnf.errors import GrammarError
from app.llm.ebnf.keywords import Schema
from app.llm.ebnf.regex import Node
from app.llm.ebnf.writer import EMPTY, Rules, alternatives, literal, optional, repeat, sequence

# Limit for minItems and maxItems.
_MAX_ITEMS = 1_000
# Limit for properties and values of enums together.
_MAX_PARTS = 1_000
# Limit for optional properties of one object, since any of those left may come next.
_MAX_OPTIONAL = 100
# Limit for nested objects, arrays and alternatives.
_MAX_DEPTH = 32
# Limits for the schemas of all anyOf and oneOf, except lists of values. A token costs a tenth of a
# millisecond for each that may still be the one; inside each other they multiply.
_MAX_BRANCHES = 200
_MAX_RECURSIVE_BRANCHES = 50
# Limit for pairs of schemas that oneOf compares; each pair takes microseconds.
_MAX_PAIRS = 3_000
_OF_NAMES = {"type", *keywords.BY_TYPE["string"]}
_BOOLEAN = alternatives([literal("true"), literal("false")])


@dataclass(frozen=True)
class Path:
    """The way from the root of the schema to one of its parts.

    Every answer has to follow the ``forced`` references on the way. After the ``unwritten`` ones,
    the grammar has written nothing yet.
    """

    depth: int = 0
    forced: frozenset[str] = frozenset()
    unwritten: frozenset[str] = frozenset()

    def inside(self, *, forced: bool) -> "Path":
        """The path to a part of an object or array; ``forced`` if every answer has the part."""
        return self._deeper(self.forced if forced else frozenset(), frozenset())

    def option(self) -> "Path":
        """The path to one of several schemas."""
        return self._deeper(frozenset(), self.unwritten)

    def _deeper(self, forced: frozenset[str], unwritten: frozenset[str]) -> "Path":
        if self.depth == _MAX_DEPTH:
            raise GrammarError(f"it nests more than {_MAX_DEPTH} levels")
        return Path(self.depth + 1, forced, unwritten)

    def follow(self, reference: str) -> "Path":
        """The path to what a reference names, which must not be on the way to it."""
        if reference in self.forced | self.unwritten:
            raise GrammarError("a $ref leads to itself, so that no answer could end")
        one = frozenset((reference,))
        return Path(self.depth, self.forced | one, self.unwritten | one)


class SchemaCompiler:
    """Compiles one JSON schema, which is parsed JSON.

    Subclasses write values in another way. ``failed`` gets the parts that cannot be compiled, in
    whose place is any JSON; ``None``: the first one is an error.
    """

    _blank = optional(literal(" "))

    def __init__(self, schema: Any, rules: Rules, failed: list[Any] | None = None) -> None:
        self._root = schema
        self._failed = failed
        self._rules = rules
        self._references: dict[str, str] = {}
        self._comma, self._colon = (rules.name(f"{literal(c)} {self._blank}") for c in ",:")
        self._json: str | None = None
        self._pairs = 0
        self._parts = 0
        self._branches = 0
        self._open: set[str] = set()
        self._is_recursive = False

    def compile(self) -> str:
        """The expression of the values that match the schema."""
        value = self._reference("#", Path())
        limit = _MAX_RECURSIVE_BRANCHES if self._is_recursive else _MAX_BRANCHES
        if self._branches > limit:
            raise GrammarError(
                f"anyOf and oneOf have more than {_MAX_BRANCHES} schemas, or more than "
                f"{_MAX_RECURSIVE_BRANCHES} where a $ref leads back"
            )
        return value

    def _value(self, schema: Any, path: Path) -> str:
        return self._or(schema, lambda: self._compiled(schema, path), self._anything)

    def _or(self, schema: Any, write: Callable[[], str], anything: Callable[[], str]) -> str:
        """What ``write`` returns, or anything where the schema cannot be compiled."""
        try:
            return write()
        except GrammarError as error:
            error.part = schema if error.part is None else error.part
            if self._failed is None or schema is False:
                raise
        self._failed.append(schema)
        return anything()

    def _compiled(self, schema: Any, path: Path) -> str:
        if schema is True:
            return self._anything()
        if schema is False:
            raise GrammarError("a part of it allows no value")
        if not isinstance(schema, dict):
            raise GrammarError("a part of it is neither an object nor a boolean")
        keywords.check(schema)
        listed = keywords.values(schema)
        if listed is not None:
            return self._listed(listed)
        if "$ref" in schema:
            self._check_type(schema, [{"$ref": schema["$ref"]}])
            return self._reference(schema["$ref"], path)
        if options := self._options(schema):
            return self._one_of(options, path)
        return self._typed(schema, path)

    def _listed(self, values: list[Any]) -> str:
        if not values:
            raise GrammarError("enum or const has no value of its type")
        self._count(len(values))
        return self._rules.shared(self._rules.texts(map(self._spelled, values)))

    def _reference(self, reference: Any, path: Path) -> str:
        target = keywords.resolve(self._root, reference)
        inner = path.follow(reference)
        if reference not in self._references:
            self._references[reference] = self._rules.reserve()
            self._open.add(reference)
            self._rules.define(self._references[reference], self._value(target, inner))
            self._open.remove(reference)
        self._is_recursive |= reference in self._open
        return self._references[reference]

    def _options(self, schema: Schema) -> list[Any]:
        """The schemas one of which has to match; none where the schema says it all itself."""
        keyword = next((k for k in ("allOf", "anyOf", "oneOf") if k in schema), None)
        if keyword is None:
            return []
        parts = schema[keyword]
        if not isinstance(parts, list) or not parts:
            raise GrammarError(f"{keyword} is not a list of schemas")
        self._check_type(schema, parts)
        if keyword == "allOf" and len(parts) > 1:
            raise GrammarError("allOf of more than one schema is not supported")
        if keyword == "oneOf":
            self._check_apart(parts)
        return parts

    def _one_of(self, parts: list[Any], path: Path) -> str:
        if len(parts) == 1:
            return self._value(parts[0], path)
        self._branches += sum(not _lists(part) for part in parts)
        return self._rules.name(alternatives(self._value(p, path.option()) for p in parts))

    def _check_apart(self, parts: list[Any]) -> None:
        pairs = self._pairs + len(parts) * (len(parts) - 1) // 2
        if pairs > _MAX_PAIRS:
            raise GrammarError("oneOf has too many schemas")
        self._pairs = pairs
        if not all(
            keywords.apart(self._root, a, b) for i, a in enumerate(parts) for b in parts[:i]
        ):
            raise GrammarError("oneOf is not supported where a value could be of two; use anyOf")

    def _check_type(self, schema: Schema, parts: list[Any]) -> None:
        """Reject a type beside schemas that allow other types."""
        if (named := keywords.types(schema)) is None:
            return
        for part in parts:
            kinds = keywords.types(keywords.target(self._root, part))
            if kinds is None or not set(kinds) <= set(named):
                raise GrammarError("type beside $ref, allOf, anyOf or oneOf is not supported")

    def _typed(self, schema: Schema, path: Path) -> str:
        # A schema without a type gets the types that its keywords belong to.
        names = keywords.types(schema) or keywords.meant(schema)
        if not names:
            return self._anything()
        inner = path if len(names) == 1 else path.option()
        return alternatives(self._of_type(name, schema, inner) for name in names)

    def _of_type(self, name: str, schema: Schema, path: Path) -> str:
        if name == "object":
            return self._object(schema, path)
        if name == "array":
            return self._array(schema, path)
        if name == "string":
            return self._string(schema)
        if name in {"integer", "number"}:
            write = numbers.integer if name == "integer" else numbers.number
            bounds = [keywords.bound(schema, keyword) for keyword in keywords.BOUNDS]
            node, step = write(numbers.Bounds(*bounds)), keywords.bound(schema, "multipleOf")
            return self._rules.once((node, step), lambda: self._numbers(node, step))
        return _BOOLEAN if name == "boolean" else literal("null")

    def _numbers(self, node: Node, step: Decimal | None) -> str:
        states = automaton.of_expression(node)
        if step is not None:
            states = numbers.multiples(states, step)
        return self._rules.shared(automaton.as_rules(states, self._rules))

    def _object(self, schema: Schema, path: Path) -> str:
        members, required, others = self._all_members(schema)
        if len(members) - len(required) > _MAX_OPTIONAL:
            raise GrammarError(f"an object has more than {_MAX_OPTIONAL} optional properties")
        if not members:
            return self._map(schema, others, path)
        if beside := schema.keys() & keywords.OF_ANY_NAMES:
            raise GrammarError(f"properties beside {min(beside)} is not supported")
        written = [
            (self._member(name, part, path.inside(forced=name in required)), name in required)
            for name, part in members.items()
            if part is not False or name in required
        ]
        return self._rules.name(sequence([literal("{"), self._members(written), literal("}")]))

    def _all_members(self, schema: Schema) -> tuple[Schema, set[str], Any]:
        """The listed and the required members, the names of the latter, and the rule of others."""
        properties, required = keywords.members(schema)
        others = schema.get("additionalProperties", True)
        unlisted = [name for name in schema.get("required", ()) if name not in properties]
        if unlisted and others is False:
            raise GrammarError("a required property is not among the properties")
        members = {**properties, **dict.fromkeys(unlisted, others)}
        self._count(len(members))
        return members, required, others

    def _count(self, parts: int) -> None:
        if self._parts + parts > _MAX_PARTS:
            raise GrammarError(f"it has more than {_MAX_PARTS} properties and values of enums")
        self._parts += parts

    def _member(self, name: str, schema: Any, path: Path) -> str:
        value = self._value(schema, path)
        return self._rules.name(sequence([literal(self._named(name)), self._colon, value]))

    def _members(self, members: list[tuple[str, bool]]) -> str:
        """Members in order with commas between them; each is paired with whether it is required."""
        first = next((i for i, (_, required) in enumerate(members) if required), None)
        if first is None:
            return self._optional_members([member for member, _ in members])
        parts = [optional(sequence([member, self._comma])) for member, _ in members[:first]]
        parts.append(members[first][0])
        for member, required in members[first + 1 :]:
            following = sequence([self._comma, member])
            parts.append(following if required else optional(following))
        return sequence(parts)

    def _optional_members(self, members: list[str]) -> str:
        """Any of the members in order: one comes first, and each other one after a comma."""
        beginnings, rest = [], EMPTY
        for member in reversed(members):
            beginnings.append(sequence([member, rest]))
            following = optional(sequence([self._comma, member]))
            rest = self._rules.name(sequence([following, rest]))
        return alternatives([EMPTY, *reversed(beginnings)])

    def _map(self, schema: Schema, others: Any, path: Path) -> str:
        """An object whose members may have any names, or those of a rule."""
        least, most = (keywords.count(schema, f"{bound}Properties") for bound in ("min", "max"))
        names = schema.get("propertyNames", {})
        if not isinstance(names, dict) or names.keys() - _OF_NAMES - keywords.ANNOTATIONS:
            raise GrammarError("propertyNames is no rule for strings")
        # The same name may come twice, and counts as one member.
        if (least or 0) > 1 or (most or 0) > _MAX_ITEMS or (least and most == 0):
            raise GrammarError(f"minProperties is above 1, or maxProperties above {_MAX_ITEMS}")
        if others is False and not least:
            return literal("{}")
        value = self._value(others, path.inside(forced=bool(least)))
        member = self._rules.name(sequence([self._any_name(names), self._colon, value]))
        members = self._list_of(member, least or 0, most)
        return self._rules.name(sequence([literal("{"), members, literal("}")]), most or 0)

    def _list_of(self, item: str, least: int, most: int | None) -> str:
        """Items with commas between them."""
        if most == 0:
            return EMPTY
        most = None if most is None else most - 1
        several = sequence([item, repeat(f"{self._comma} {item}", max(0, least - 1), most)])
        return several if least else optional(several)

    def _array(self, schema: Schema, path: Path) -> str:
        least = keywords.count(schema, "minItems") or 0
        most = keywords.count(schema, "maxItems")
        if max(least, most or 0) > _MAX_ITEMS:
            raise GrammarError(f"minItems or maxItems is above {_MAX_ITEMS}")
        leading = schema.get("prefixItems", [])
        if not isinstance(leading, list):
            raise GrammarError("prefixItems is not a list of schemas")
        if most is not None:
            leading = leading[:most]
        others = schema.get("items", not leading or least > len(leading))
        if others is False or (leading and "items" not in schema and least <= len(leading)):
            most = len(leading)
        if most is not None and least > most:
            raise GrammarError("minItems is above the number of items that are allowed")
        body = self._items(leading, others, least, most, path)
        return self._rules.name(body, least if most is None else most)

    def _items(
        self, leading: list[Any], others: Any, least: int, most: int | None, path: Path
    ) -> str:
        items = [self._value(part, path.inside(forced=True)) for part in leading]
        least, most = max(0, least - len(items)), None if most is None else most - len(items)
        if most != 0:
            item = self._value(others, path.inside(forced=least > 0))
            if items:
                items[-1] = sequence([items[-1], repeat(f"({self._comma} {item})", least, most)])
            else:
                items = [self._list_of(item, least, most)]
        return sequence([literal("["), f" {self._comma} ".join(items), literal("]")])

    def _string(self, schema: Schema) -> str:
        node, least, most = rule_of(schema)
        if node is None:
            return strings.plain(self._rules, least, most)
        return strings.matching(self._rules, node, least, most)

    def _any_name(self, rule: Schema) -> str:
        return self._string(rule)

    def _named(self, name: str) -> str:
        return strings.as_written(name)

    def _spelled(self, value: Any) -> str:
        return strings.as_written(value)

    def _anything(self) -> str:
        if self._json is None:
            self._json = self._rules.reserve()
            # Integers are numbers already.
            names = [name for name in keywords.BY_TYPE if name != "integer"]
            kinds = [self._of_type(name, {}, Path()) for name in names]
            self._rules.define(self._json, alternatives(kinds))
        return self._json


def _lists(schema: Any) -> bool:
    return isinstance(schema, dict) and bool(schema.keys() & {"enum", "const"})


def rule_of(schema: Schema) -> tuple[Node | None, int, int | None]:
    """What a string's pattern or format wants, and the bounds of its length.

    Raises:
        GrammarError: They cannot be held.
    """
    least, most = keywords.count(schema, "minLength") or 0, keywords.count(schema, "maxLength")
    pattern, name = schema.get("pattern"), schema.get("format")
    if pattern is None and name is None:
        return None, least, most
    if pattern is not None and name is not None:
        raise GrammarError("pattern beside format is not supported")
    if name is not None:
        if not isinstance(name, str) or name not in strings.FORMATS:
            raise GrammarError(f"the format {str(name)[:40]} is not supported")
        return regex.parse(strings.FORMATS[name], whole=True), least, most
    if not isinstance(pattern, str):
        raise GrammarError("pattern is not a string")
    return regex.parse(pattern, whole=False), least, most
