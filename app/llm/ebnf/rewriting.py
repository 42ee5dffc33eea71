"""Rewrites JSON schemas with the keywords of other dialects into those that grammars hold.

OpenAPI generators, zod, pydantic and hand-written tools say the same in different ways. What has an
equal among the held keywords is replaced by it. Of the rest, keywords that would restrict the
answer are dropped and named, unless the schema is strict: then the compiler refuses them. In a
schema that is not strict, unknown keywords are annotations, as JSON Schema has it.
"""

import json
import math
from itertools import combinations, permutations
from typing import Any, Final

from app.llm.ebnf import keywords
from app.llm.ebnf.strings import FORMATS

Schema = dict[str, Any]

RESTRICTING: Final = frozenset(
    [
        *("not", "if", "then", "else", "uniqueItems", "contains", "minContains", "maxContains"),
        *("patternProperties", "dependentRequired", "dependentSchemas", "dependencies"),
        *("additionalItems",),
        *("unevaluatedItems", "unevaluatedProperties", "$dynamicRef", "$recursiveRef", "nullable"),
    ]
)
"""Keywords of JSON Schema and OpenAPI that restrict the answer, and that no grammar holds."""

_BY_NAME: Final = ("properties", "$defs", "definitions")
_LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems")
_ONE: Final = ("items", "additionalProperties")
_OF_TYPES: Final = frozenset[str]().union(*keywords.BY_TYPE.values())
CONSTRAINING: Final = RESTRICTING | keywords.HELD
"""Keywords that restrict the answer; others are annotations, with names of the caller's own."""
# Their values may be null; another keyword that is null is not there.
_VALUES: Final = ("const", "default", "example", "examples")
# Sets of this many values are listed, the smallest in every order; and limits for all of a schema.
_MOST_IN_A_SET: Final = 7
_MOST_IN_ANY_ORDER: Final = 4
_MOST_SETS: Final = 400
# Members of which the first that is there may be any.
_MOST_FIRST: Final = 20
_OBJECT: Final = {"type", "properties", "required"}

# Annotations in the newest draft, and zod's name of a schema.
_SAY_NOTHING: Final = ("contentEncoding", "contentMediaType", "contentSchema", "id")
# Formats that every string has.
_ANY_TEXT: Final = ("password", "binary", "path", "file-path", "directory-path", "multi-line")
# zod writes a pattern beside each format. Each match of these, by their beginnings, has the format,
# so the pattern alone is held.
_DATE = (
    r"^(?:(?:\d\d[2468][048]|\d\d[13579][26]|\d\d0[48]|[02468][048]00|[13579][26]00)-02-29|\d{4}-"
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|(?:02)-"
    r"(?:0[1-9]|1\d|2[0-8])))"
)
_PATTERNS: Final = {
    "date": _DATE,
    "date-time": _DATE + r"T(?:(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d",
    "email": r"^(?:[A-Za-z0-9_'+\-]+\.)*[A-Za-z0-9_'+\-]*[A-Za-z0-9_+-]@(?:[A-Za-z0-9][A-Za-z0-9",
    "uuid": "^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-",
    "ipv4": "^(?:(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9][0-9]|[0-9])",
    "ipv6": "^(([0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}|",
}
# No grammar holds these, but what is held of their formats matches them.
_IMPLIED: Final = {
    "duration": r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?"
    r"(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$",
    "hostname": r"^(?=.{1,253}\.?$)[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
    r"(?:\.[a-zA-Z0-9](?:[-0-9a-zA-Z]{0,61}[0-9a-zA-Z])?)*\.?$",
    "base64": "^$|^(?:[0-9a-zA-Z+/]{4})*(?:(?:[0-9a-zA-Z+/]{2}==)|(?:[0-9a-zA-Z+/]{3}=))?$",
}
# The formats of JSON Schema. Another name beside a pattern only names the pattern.
_DEFINED: Final = frozenset(
    [
        *("date", "time", "date-time", "duration", "email", "idn-email", "hostname", "ipv4"),
        *("idn-hostname", "ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid", "regex"),
        *("uri-template", "json-pointer", "relative-json-pointer"),
    ]
)


class Rewriter:
    """Rewrites the parts of one schema, and collects the keywords that it drops in ``dropped``."""

    def __init__(self, root: Any, *, strict: bool) -> None:
        self._root = root
        self._strict = strict
        self._sets = 0
        self.dropped: set[str] = set()

    def rewrite(self, schema: Any) -> Any:
        """An equal schema; what is not strict may allow more."""
        if not isinstance(schema, dict):
            return schema
        if schema in ({"not": {}}, {"not": True}):
            return False
        written = {
            name: value
            for name, value in schema.items()
            if name not in _SAY_NOTHING and (value is not None or name in _VALUES)
        }
        _use_new_names(written)
        if written.pop("nullable", False) is True:
            written = _or_null(written)
        self._merge(written)
        self._name_members(written)
        self._list_sets(written)
        _choose_values(written)
        _count_members(written)
        _write_alternatives_out(written)
        _choose_pattern_or_format(written)
        self._rewrite_parts(written)
        if not self._strict:
            self._drop_what_is_not_held(written)
        return written

    def _rewrite_parts(self, schema: Schema) -> None:
        for keyword in _BY_NAME:
            if isinstance(parts := schema.get(keyword), dict):
                schema[keyword] = {name: self.rewrite(part) for name, part in parts.items()}
        for keyword in _LISTS:
            if isinstance(parts := schema.get(keyword), list):
                schema[keyword] = [self.rewrite(part) for part in parts]
        for keyword in _ONE:
            if keyword in schema:
                schema[keyword] = self.rewrite(schema[keyword])

    def _drop(self, schema: Schema, *names: str) -> None:
        """Remove keywords, and note those that restricted the answer."""
        for name in names:
            if schema.pop(name, None) is not None and name in CONSTRAINING:
                self.dropped.add(name)

    def _merge(self, schema: Schema) -> None:
        """Replace schemas that all hold by one: of annotations alone, or of different members."""
        if not isinstance(parts := schema.get("allOf"), list) or schema.keys() & _OF_TYPES:
            return
        saying = [p for p in parts if not isinstance(p, dict) or p.keys() - keywords.ANNOTATIONS]
        if len(saying) < 2:
            schema["allOf"] = saying or [{}]
            return
        objects = [keywords.target(self._root, part) for part in saying]
        members = [part.get("properties") for part in objects]
        names = [name for listed in members if isinstance(listed, dict) for name in listed]
        if len(names) == len(set(names)) and all(
            isinstance(listed, dict) and part.keys() <= _OBJECT | keywords.ANNOTATIONS
            for part, listed in zip(objects, members, strict=True)
        ):
            del schema["allOf"]
            schema["type"] = "object"
            schema["properties"] = {k: v for part in objects for k, v in part["properties"].items()}
            schema["required"] = [name for part in objects for name in _names(part)]

    def _name_members(self, schema: Schema) -> None:
        """Replace a rule for the names of members where it lists them, or allows any."""
        if not isinstance(schema.get("propertyNames"), dict):
            return
        rule = keywords.target(self._root, schema["propertyNames"])
        listed = rule.get("enum", [rule.get("const")])
        if rule.keys() <= {"type", *keywords.ANNOTATIONS}:
            del schema["propertyNames"]
        elif (
            not schema.get("properties")
            and listed != [None]
            and all(isinstance(n, str) for n in listed)
        ):
            member = schema.get("additionalProperties", True)
            schema |= {"properties": dict.fromkeys(listed, member), "additionalProperties": False}
            del schema["propertyNames"]

    def _list_sets(self, schema: Schema) -> None:
        """Replace an array of different values of a short list by the arrays that it may be."""
        if schema.get("uniqueItems") is not True or schema.keys() & {"prefixItems", "contains"}:
            return
        item = keywords.target(self._root, schema.get("items"))
        listed = [True, False] if item.get("type") == "boolean" else item.get("enum")
        if item.keys() - {"enum", "type", *keywords.ANNOTATIONS} or not isinstance(listed, list):
            return
        values = keywords.values({**item, "enum": listed}) or []
        different = list({json.dumps(value): value for value in values}.values())
        least, most = schema.get("minItems", 0), schema.get("maxItems", len(different))
        kinds = _listed(schema.get("type", "array"))
        if len(different) > _MOST_IN_A_SET or not set(kinds) <= {"array", "null"}:
            return
        choose = permutations if len(different) <= _MOST_IN_ANY_ORDER else combinations
        counts = range(least, min(most, len(different)) + 1)
        sets = [list(chosen) for count in counts for chosen in choose(different, count)]
        self._sets += len(sets)
        if sets and self._sets <= _MOST_SETS:
            for name in ("type", "items", "uniqueItems", "minItems", "maxItems"):
                schema.pop(name, None)
            schema["enum"] = [*sets, None] if "null" in kinds else sets

    def _drop_what_is_not_held(self, schema: Schema) -> None:
        self._drop(schema, *(schema.keys() - keywords.HELD - keywords.ANNOTATIONS))
        names = schema.get("type")
        if any(n not in (None, *keywords.BY_TYPE) for n in _listed(names)) or names == []:
            self._drop(schema, "type")
        is_text = "type" not in schema or "string" in _listed(schema["type"])
        if not is_text:
            schema.pop("format", None)
        elif "pattern" in schema or schema.get("format") not in FORMATS:
            self._drop(schema, "format")
        if schema.get("properties"):
            self._drop(schema, *keywords.OF_ANY_NAMES)
        # One of the combining keywords holds, and nothing beside it but a type.
        combining = [k for k in keywords.COMBINING if k in schema]
        if "properties" in schema and not {"enum", "const", "$ref"} & schema.keys():
            self._drop(schema, *combining)
        elif combining:
            self._drop(schema, *(_OF_TYPES | set(combining[1:])))
            if combining[0] not in ("enum", "const"):
                schema.pop("type", None)
        if len(_listed(schema.get("allOf", ()))) > 1:
            self.dropped.add("allOf")
            schema["allOf"] = [max(schema["allOf"], key=lambda part: len(str(part)))]


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _names(schema: Any) -> list[str]:
    """The required members of an object."""
    required = schema.get("required")
    return [n for n in required if isinstance(n, str)] if isinstance(required, list) else []


def _or_null(schema: Schema) -> Schema:
    """A schema that allows null as well; a ``$ref`` to a part of it still leads there."""
    null = {"type": "null"}
    if isinstance(listed := schema.get("enum"), list):
        schema = {**schema, "enum": listed if None in listed else [*listed, None]}
    elif isinstance(parts := schema.get("anyOf"), list):
        return {**schema, "anyOf": [*parts, null]}
    elif schema.keys() & set(keywords.COMBINING):
        return {"anyOf": [schema, null]}
    if "type" in schema:
        return {**schema, "type": list(dict.fromkeys([*_listed(schema["type"]), "null"]))}
    return schema


def _use_new_names(schema: Schema) -> None:
    """Replace what drafts before 2020-12 wrote in another way."""
    for bound in ("minimum", "maximum"):
        exclusive = f"exclusive{bound.capitalize()}"
        is_old = isinstance(schema.get(exclusive), bool)
        if is_old and schema.pop(exclusive) and bound in schema:
            schema[exclusive] = schema.pop(bound)
    if isinstance(schema.get("items"), list):
        schema["prefixItems"] = schema.pop("items")
        if "additionalItems" in schema:
            schema["items"] = schema.pop("additionalItems")
    if isinstance(kind := schema.get("type"), str) and kind.lower() in keywords.BY_TYPE:
        schema["type"] = kind.lower()


def _write_alternatives_out(schema: Schema) -> None:
    """Members of which one of several sets is required become alternatives with all of them."""
    keyword = "anyOf" if "anyOf" in schema else "oneOf"
    parts = schema.get(keyword)
    if not isinstance(parts, list) or not schema.keys() & keywords.BY_TYPE["object"]:
        return
    if not all(isinstance(part, dict) and part.keys() == {"required"} for part in parts):
        return
    sets = [_names(part) for part in parts]
    members, always = schema.get("properties", {}), _names(schema)
    if keyword == "oneOf" and (any(len({*s, *always}) != 1 for s in sets) or not members):
        return
    base = {k: schema.pop(k) for k in ("type", *keywords.BY_TYPE["object"]) if k in schema}
    excluded = {name for names in sets for name in names if keyword == "oneOf"}
    del schema[keyword]
    schema["anyOf"] = [
        {
            **base,
            "properties": {k: v for k, v in members.items() if k in names or k not in excluded},
            "required": list(dict.fromkeys([*always, *names])),
        }
        for names in sets
    ]


def _choose_values(schema: Schema) -> None:
    """Of the listed values keep those of an allowed length."""
    values, least, most = (schema.get(name) for name in ("enum", "minLength", "maxLength"))
    bounds = least or 0, most if most is not None else math.inf
    if isinstance(values, list) and all(isinstance(b, int | float) for b in bounds):
        for name in ("minLength", "maxLength"):
            schema.pop(name, None)
        first, last = bounds
        schema["enum"] = [v for v in values if not isinstance(v, str) or first <= len(v) <= last]


def _count_members(schema: Schema) -> None:
    """Replace bounds on the number of listed members by which of them are required."""
    members, required = schema.get("properties"), set(_names(schema))
    if not isinstance(members, dict) or not members:
        return
    least, most = (schema.get(f"{bound}Properties") for bound in ("min", "max"))
    if isinstance(most, int) and most >= len(required.union(members)):
        del schema["maxProperties"]
    if isinstance(least, int) and least <= len(required):
        del schema["minProperties"]
    elif least == 1 and len(members) <= _MOST_FIRST and not schema.keys() & {*keywords.COMBINING}:
        del schema["minProperties"]
        base = {k: schema.pop(k) for k in ("type", *keywords.BY_TYPE["object"]) if k in schema}
        names = [*members]
        schema["anyOf"] = [
            {**base, "properties": {n: members[n] for n in names[i:]}, "required": [names[i]]}
            for i in range(len(names))
        ]


def _choose_pattern_or_format(schema: Schema) -> None:
    """Drop a format that any text has, and of a pattern and a format what the other implies."""
    name, pattern = schema.get("format"), schema.get("pattern")
    if not isinstance(name, str) or not isinstance(pattern, str | None):
        return
    beginning = _PATTERNS.get(name, "" if name not in _DEFINED else None)
    if pattern and pattern == _IMPLIED.get(name):
        del schema["pattern"]
    elif name in _ANY_TEXT or (pattern and beginning is not None and pattern.startswith(beginning)):
        del schema["format"]
