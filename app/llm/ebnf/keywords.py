"""Reads JSON schemas: keywords, types, references, and whether two schemas exclude each other.

A malformed schema raises :class:`GrammarError`.
"""

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final
from urllib.parse import unquote

from app.llm.ebnf.errors import GrammarError

Schema = Mapping[str, Any]

ANNOTATIONS: Final = frozenset(
    [
        "title",
        "description",
        "default",
        "example",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "discriminator",
        "$schema",
        "$id",
        "$comment",
        "$defs",
        "definitions",
    ]
)
"""Keywords that do not restrict the answer."""

BOUNDS: Final = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")

BY_TYPE: Final[dict[str, frozenset[str]]] = {
    "object": frozenset(
        [
            *("properties", "required", "additionalProperties"),
            *("propertyNames", "minProperties", "maxProperties"),
        ]
    ),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems")),
    "string": frozenset(("minLength", "maxLength", "pattern", "format")),
    "number": frozenset((*BOUNDS, "multipleOf")),
    "integer": frozenset((*BOUNDS, "multipleOf")),
    "boolean": frozenset(),
    "null": frozenset(),
}
"""Keywords that restrict the values of each type."""

COMBINING: Final = ("$ref", "const", "enum", "allOf", "anyOf", "oneOf")
"""Keywords of which a schema may have one, and then none of :data:`BY_TYPE`."""

OF_ANY_NAMES: Final = ("propertyNames", "minProperties", "maxProperties")
"""What restricts an object without listed properties."""

HELD: Final = frozenset(("type", *COMBINING)).union(*BY_TYPE.values())
"""Keywords that grammars hold."""

_ALL = set(BY_TYPE) - {"integer"}
# Values with which an unsupported keyword does not restrict the answer.
_SAYS_NOTHING = {"uniqueItems": False, "nullable": False}


def check(schema: Schema) -> None:
    """Reject a schema with a keyword that would not be enforced."""
    for keyword, value in schema.items():
        if keyword in HELD or keyword in ANNOTATIONS or keyword.startswith("x-"):
            continue
        if keyword not in _SAYS_NOTHING or value != _SAYS_NOTHING[keyword]:
            raise GrammarError(f"the keyword {keyword[:40]} is not supported")
    combining = [keyword for keyword in COMBINING if keyword in schema]
    for other in (*combining[1:], *schema) if combining else ():
        if other in HELD and other not in ("type", combining[0]):
            raise GrammarError(f"{combining[0]} beside {other} is not supported")


def types(schema: Schema) -> list[str] | None:
    """The types that a schema names; ``None`` if it names none."""
    given = schema.get("type")
    if given is None:
        return None
    names = given if isinstance(given, list) else [given]
    if not names or any(not isinstance(name, str) or name not in BY_TYPE for name in names):
        raise GrammarError("type is not one of JSON's types, or a list of them")
    return names


def meant(schema: Schema) -> list[str]:
    """The types to which a schema's keywords belong."""
    return [t for t, names in BY_TYPE.items() if t != "integer" and names & schema.keys()]


def values(schema: Schema) -> list[Any] | None:
    """The values that a schema lists, if they have its type; ``None`` if it lists none."""
    if "const" not in schema and "enum" not in schema:
        return None
    listed = schema["enum"] if "enum" in schema else [schema["const"]]
    if not isinstance(listed, list):
        raise GrammarError("enum is not a list")
    named = types(schema)
    return [v for v in listed if named is None or any(_is(v, name) for name in named)]


def kind(value: Any) -> str:
    """The type of a JSON value; integers are numbers."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return "number"
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names[type(value)]


def _is(value: Any, name: str) -> bool:
    return kind(value) == name or (name == "integer" and type(value) is int)


def count(schema: Schema, keyword: str) -> int | None:
    """The value of a keyword that is a count, such as ``minItems``; ``None`` if it is absent."""
    value = schema.get(keyword)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise GrammarError(f"{keyword} is not a whole number from 0 up")
    return value


def bound(schema: Schema, keyword: str) -> Decimal | None:
    """The value of a keyword that bounds numbers; ``None`` if it is absent."""
    value = schema.get(keyword)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise GrammarError(f"{keyword} is not a number")
    number = Decimal(str(value))
    if not number.is_finite():
        raise GrammarError(f"{keyword} is too large")
    return number


def members(schema: Schema) -> tuple[Schema, set[str]]:
    """The listed properties of an object, and the names of the required ones."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise GrammarError("properties is not an object, or required is not a list")
    if not all(isinstance(name, str) for name in required):
        raise GrammarError("required is not a list of names")
    return properties, set(required)


def resolve(root: Any, reference: Any) -> Any:
    """The part of the schema ``root`` that a ``$ref`` names."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise GrammarError("a $ref leads out of the schema")
    part = root
    for step in unquote(reference).split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(part, dict) and key in part:
            part = part[key]
        elif isinstance(part, list) and key.isdecimal() and int(key[:9]) < len(part):
            part = part[int(key[:9])]
        else:
            raise GrammarError("a $ref names no part of the schema")
    return part


def apart(root: Any, first: Any, second: Any, *, depth: int = 3) -> bool:
    """Whether no value can match both schemas; ``False`` also if that is not certain."""
    first, second = target(root, first), target(root, second)
    one, other = values(first), values(second)
    if one is not None and other is not None:
        return _texts(one).isdisjoint(_texts(other))
    both = kinds(first) or _ALL, kinds(second) or _ALL
    if both[0].isdisjoint(both[1]):
        return True
    if both != ({"object"}, {"object"}) or depth == 0:
        return False
    (mine, required), (its, also_required) = members(first), members(second)
    return any(
        apart(root, mine.get(name), its.get(name), depth=depth - 1)
        for name in required & also_required
    )


def target(root: Any, schema: Any) -> Schema:
    """The schema at the end of a chain of references; empty if the chain has no end."""
    for _ in range(8):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        schema = resolve(root, schema["$ref"])
    return schema if isinstance(schema, dict) and "$ref" not in schema else {}


def kinds(schema: Schema) -> set[str]:
    """The types that a schema lists or names, as :func:`kind` has them; none if it does not."""
    listed = values(schema)
    if listed is not None:
        return {kind(value) for value in listed}
    return {"number" if name == "integer" else name for name in types(schema) or ()}


def _texts(listed: list[Any]) -> set[str]:
    return {json.dumps(v, sort_keys=True) for v in listed}
