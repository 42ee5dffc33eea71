"""Schemas as programs send them: what zod 4, pydantic, FastMCP and OpenAPI generators write.

Most are of one value; :func:`schemas` puts each into an object, as programs do.
"""

import datetime as dt
import decimal
import enum
import ipaddress
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AnyUrl,
    AwareDatetime,
    Base64Bytes,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    HttpUrl,
    Json,
    NonNegativeInt,
    PositiveFloat,
    SecretStr,
    TypeAdapter,
)

Schema = dict[str, Any]

# Schemas of older dialects, which the validator of the newest does not read.
OLD = {
    "openapi: tuple of draft 7",
    "openapi: exclusive minimum of draft 4",
    "openapi: inclusive minimum of draft 4",
    "openapi: type in capitals",
    "openapi: nulls",
}

_TEXT = {"type": "string"}
_INT = {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991}

# What z.toJSONSchema() of zod 4.6.7 wrote, without $schema.
_ZOD_FILE = Path(__file__).with_name("zod_schemas.jsonl")
ZOD: dict[str, Schema] = {
    made["name"]: made["schema"]
    for made in map(json.loads, _ZOD_FILE.read_text(encoding="utf-8").splitlines())
}

OPENAPI: dict[str, Schema] = {
    **{
        f"format {name}": {"type": kind, "format": name}
        for kind, names in {
            "string": "byte binary password uuid date date-time hostname ipv6 uri-reference iri "
            "idn-email json-pointer regex uri-template decimal char",
            "integer": "int32 int64 uint8 unix-time",
            "number": "float double",
        }.items()
        for name in names.split()
    },
    "nullable": {"type": "string", "nullable": True},
    "tuple of draft 7": {
        "type": "array",
        "items": [_TEXT, {"type": "number"}],
        "additionalItems": False,
        "minItems": 2,
    },
    "allOf of two": {
        "allOf": [
            {"type": "object", "properties": {"a": _TEXT}, "required": ["a"]},
            {"type": "object", "properties": {"b": _INT}, "required": ["b"]},
        ]
    },
    "exclusive minimum of draft 4": {"type": "number", "minimum": 0, "exclusiveMinimum": True},
    "inclusive minimum of draft 4": {"type": "number", "minimum": 0, "exclusiveMinimum": False},
    "one allOf": {"allOf": [{"type": "string"}], "description": "X", "nullable": True},
    "allOf with a description": {"allOf": [{"type": "string"}, {"description": "X"}]},
    "readOnly and writeOnly": {"type": "string", "readOnly": True, "writeOnly": False},
    "xml": {"type": "array", "items": _TEXT, "xml": {"wrapped": True}},
    "externalDocs": {"type": "object", "externalDocs": {"url": "https://example.com"}},
    "an extension": {"type": "string", "x-go-name": "Name", "x-enum-varnames": ["A"]},
    "example": {"type": "string", "example": "x", "default": None},
    "nullable enum": {"type": "string", "enum": ["a", "b", None], "nullable": True},
    "enum with a format": {"type": "integer", "format": "int32", "enum": [1, 2]},
    "enum with a length": {"type": "string", "minLength": 1, "enum": ["a", "b"]},
    "one of required": {
        "type": "object",
        "properties": {"a": _TEXT, "b": _TEXT},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    "exactly one of required": {
        "type": "object",
        "properties": {"a": _TEXT, "b": _TEXT},
        "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    "not both": {
        "type": "object",
        "properties": {"a": _TEXT, "b": _TEXT},
        "not": {"required": ["a", "b"]},
    },
    "minProperties": {"type": "object", "properties": {"a": _TEXT}, "minProperties": 1},
    "a map of some": {
        "type": "object",
        "additionalProperties": {"type": "boolean"},
        "propertyNames": {"type": "string", "minLength": 2, "maxLength": 30},
        "minProperties": 1,
        "maxProperties": 3,
    },
    "maxProperties": {"type": "object", "additionalProperties": _TEXT, "maxProperties": 3},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "if then else": {"type": "object", "if": {"required": ["a"]}, "then": {}, "else": {}},
    "patternProperties": {"type": "object", "patternProperties": {"^x": _TEXT}},
    "unevaluated": {"type": "object", "properties": {"a": _TEXT}, "unevaluatedProperties": False},
    "overlapping oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "contains": {"type": "array", "contains": {"const": 1}, "minContains": 1},
    "long array": {"type": "array", "items": _TEXT, "maxItems": 10_000},
    "type list": {"type": ["string", "null"], "maxLength": 20},
    "type in capitals": {"type": "STRING"},
    "unknown type": {"type": "file"},
    "nulls": {"type": "string", "format": None, "pattern": None, "enum": None},
    "ref with a sibling": {"$ref": "#/$defs/Name", "nullable": True, "maxLength": 5},
    "ref to nothing": {"$ref": "#/components/schemas/Gone"},
    "remote ref": {"$ref": "https://example.com/schema.json"},
    "anchor": {"$ref": "#name"},
}

FASTMCP: dict[str, Schema] = {
    "no arguments": {"type": "object", "properties": {}},
    "annotations": {"type": "string", "title": "Path", "markdownDescription": "**x**"},
    "path": {"type": "string", "format": "path", "title": "Path"},
    "directory": {"type": "string", "format": "directory-path"},
    "any object": {"type": "object", "additionalProperties": True, "title": "Arguments"},
    "a query": {"type": "string", "minLength": 1, "maxLength": 10_000, "description": "SQL"},
    "a limit": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 10},
    "a list of edits": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"oldText": _TEXT, "newText": _TEXT},
            "required": ["oldText", "newText"],
            "additionalProperties": False,
        },
    },
    "an array without items": {"type": "array"},
    "a json value": {"title": "Value"},
    "uniqueItems": {"type": "array", "items": _TEXT, "uniqueItems": True},
    "enumNames": {"type": "string", "enum": ["a", "b"], "enumNames": ["A", "B"]},
    "errorMessage": {"type": "string", "pattern": "^a", "errorMessage": {"pattern": "x"}},
    "propertyOrdering": {"type": "object", "properties": {"b": _INT}, "propertyOrdering": ["b"]},
}


class _Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class _Pet(BaseModel):
    kind: Literal["cat", "dog"]
    name: Annotated[str, Field(max_length=30)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    pet: _Pet
    pets: list[_Pet] = Field(default_factory=list, max_length=3)


class _Tree(BaseModel):
    value: int
    left: "_Tree | None" = None
    right: "_Tree | None" = None


PYDANTIC: dict[str, Any] = {
    "str": str,
    "bytes": bytes,
    "int": int,
    "float": float,
    "bool": bool,
    "decimal": decimal.Decimal,
    "date": dt.date,
    "datetime": dt.datetime,
    "aware datetime": AwareDatetime,
    "time": dt.time,
    "timedelta": dt.timedelta,
    "uuid": uuid.UUID,
    "AnyUrl": AnyUrl,
    "HttpUrl": HttpUrl,
    "IPv4": ipaddress.IPv4Address,
    "IPv6": ipaddress.IPv6Address,
    "network": ipaddress.IPv4Network,
    "SecretStr": SecretStr,
    "Base64Bytes": Base64Bytes,
    "ByteSize": ByteSize,
    "Json": Json,
    "enum": _Colour,
    "literal": Literal["a", 1, True] | None,
    "NonNegativeInt": NonNegativeInt,
    "PositiveFloat": PositiveFloat,
    "multiple_of": Annotated[int, Field(multiple_of=5)],
    "pattern": Annotated[str, Field(pattern=r"^\d{3}-\d{4}$", max_length=8)],
    "long text": Annotated[str, Field(max_length=2000)],
    "set": set[str],
    "frozenset": frozenset[_Colour],
    "tuple": tuple[int, str],
    "long tuple": tuple[int, ...],
    "dict": dict[str, int],
    "dict by enum": dict[_Colour, int],
    "dict by int": dict[int, str],
    "optional": int | None,
    "union": int | str | list[float],
    "any": Any,
    "model": _Pet,
    "strict model": _Strict,
    "tree": _Tree,
}


def schemas() -> Iterator[tuple[str, Schema]]:
    """Each schema with its name."""
    for program, values in {"zod": ZOD, "openapi": OPENAPI, "fastmcp": FASTMCP}.items():
        for name, value in values.items():
            inner = {"value": value, "note": {"type": "boolean"}}
            schema = {"type": "object", "properties": inner, "required": ["value", "note"]}
            named = {"Name": {"type": "string"}, **value.get("$defs", {})}
            yield f"{program}: {name}", schema | {"$defs": named}
    for name, kind in PYDANTIC.items():
        inner_schema = TypeAdapter(kind).json_schema(
            ref_template="#/properties/value/$defs/{model}"
        )
        schema = {"type": "object", "properties": {"value": inner_schema}, "required": ["value"]}
        yield f"pydantic: {name}", schema
