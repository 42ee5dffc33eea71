"""Rules between the fields of a request, as its JSON Schema tells them.

Validators enforce the same rules with better messages; these make the OpenAPI document as strict.
"""

from typing import Any

Schema = dict[str, Any]

_ANNOTATIONS = ("title", "description", "default")

NULL: Schema = {"type": "null"}
NON_EMPTY: Schema = {"type": "array", "minItems": 1}
ABSENT: Schema = {"enum": [None]}
"""A field that is not sent, or that is null, which is the same."""


def has(**fields: Schema) -> Schema:
    """Objects in which these fields stand, each as its schema says."""
    return {"properties": fields, "required": list(fields)}


def where_present(**fields: Schema) -> Schema:
    """Objects in which these fields, if they stand there, are as their schemas say."""
    return {"properties": fields}


def either(*alternatives: Schema) -> Schema:
    """What at least one schema allows."""
    return {"anyOf": list(alternatives)}


def both(*schemas: Schema) -> Schema:
    """What all schemas allow."""
    return {"allOf": list(schemas)}


def or_null(schema: Schema) -> Schema:
    """A field's schema that allows null as well; its annotations stay at the top."""
    if NULL in schema.get("anyOf", ()):
        return schema
    annotations: Schema = {k: v for k, v in schema.items() if k in _ANNOTATIONS}
    inner = {k: v for k, v in schema.items() if k not in annotations}
    alternatives = inner["anyOf"] if inner.keys() == {"anyOf"} else [inner]
    return {"anyOf": [*alternatives, NULL], **annotations}
