"""Random JSON schemas of the kinds that callers send, repeatable by a seed."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_WORDS = (
    "name",
    "city",
    "age",
    "tags",
    "price",
    "status",
    "owner",
    "notes",
    "kind",
    "größe",
    "a b",
)
_PATTERNS = ("^[A-Z]{2}[0-9]{2}$", "^(red|green|blue)$", "^[a-z]+(-[a-z]+){0,2}$", r"^\d{3}-\d{4}$")
_FORMATS = ("date", "time", "date-time", "uuid", "email", "ipv4")


class RandomSchemas:
    """Makes schemas that can be satisfied and have short answers.

    Attributes:
        largest_depth: Most objects and arrays inside each other.
    """

    def __init__(self, seed: int, *, largest_depth: int = 3) -> None:
        self._random = random.Random(seed)
        self._depth = largest_depth
        self._definitions: dict[str, Schema] = {}

    def one(self) -> Schema:
        """A schema whose root is an object, as OpenAI's API requires."""
        self._definitions = {}
        root = self._object(self._depth)
        return {**root, "$defs": self._definitions} if self._definitions else root

    def _value(self, depth: int) -> Schema:
        leaves: list[Callable[[], Schema]] = [
            self._string,
            self._string,
            self._integer,
            self._number,
            self._choice,
            self._constant,
        ]
        nested = [self._object, self._array, self._nullable, self._reference]
        if depth > 0 and self._random.random() < 0.5:
            return self._random.choice(nested)(depth - 1)
        return self._random.choice(leaves)()

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(_WORDS, self._random.randint(1, 4))
        required = [name for name in names if self._random.random() < 0.7]
        return {
            "type": "object",
            "title": "An object",
            "properties": {name: self._value(depth) for name in names},
            "required": required,
            "additionalProperties": False,
        }

    def _array(self, depth: int) -> Schema:
        least = self._random.randint(0, 2)
        return {
            "type": "array",
            "items": self._value(depth),
            "minItems": least,
            "maxItems": least + self._random.randint(0, 2),
        }

    def _nullable(self, depth: int) -> Schema:
        return {"anyOf": [self._value(depth), {"type": "null"}], "default": None}

    def _reference(self, depth: int) -> Schema:
        name = f"Part{len(self._definitions)}"
        self._definitions[name] = {}
        self._definitions[name] = self._object(depth)
        return {"$ref": f"#/$defs/{name}"}

    def _string(self) -> Schema:
        kind = self._random.randrange(4)
        if kind == 0:
            return {"type": "string", "pattern": self._random.choice(_PATTERNS)}
        if kind == 1:
            return {"type": "string", "format": self._random.choice(_FORMATS)}
        least = self._random.randint(0, 5)
        longest = least + self._random.randint(1, 20)
        return {"type": "string", "minLength": least, "maxLength": longest}

    def _integer(self) -> Schema:
        least = self._random.randint(-200, 200)
        return {
            "type": "integer",
            "minimum": least,
            "maximum": least + self._random.randint(0, 500),
        }

    def _number(self) -> Schema:
        least = self._random.randint(-100, 100) / 4
        return {"type": "number", "minimum": least, "maximum": least + self._random.randint(1, 40)}

    def _choice(self) -> Schema:
        values = ["yes", "no", 'it\'s "quoted"', "ünï", 7, -1.5, None, True]
        return {"enum": self._random.sample(values, self._random.randint(1, 4))}

    def _constant(self) -> Schema:
        return {"const": self._random.choice(["fixed", 3, False])}
