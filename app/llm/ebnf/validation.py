"""Checks values against the keywords of a schema that its grammar does not hold.

The schema is a caller's. So what it can ask for is bounded: patterns are run by RE2, a reference
leads to no other document, and a check that takes long has no result.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from itertools import islice
from typing import Any, Final

from jsonschema import Draft202012Validator, ValidationError, validators
from referencing import Registry

from app.core.pii.patterns import LinearPattern
from app.llm.ebnf.rewriting import Rewriter

Check = Callable[[Any, Any, Any, Any], Any]

# Seconds of processor time for an answer; one of 500 tokens takes one or two hundredths.
_MOST_SECONDS: Final = 0.2
_MOST_FAULTS: Final = 100
# The library runs the patterns of these with `re`, which need not end.
_WITH_PATTERNS: Final = ("patternProperties", "unevaluatedItems", "unevaluatedProperties")

# Most keywords within each other. The library takes up to four of Python's 1,000 frames for one.
_DEEPEST: Final = 100

_deadline: ContextVar[float] = ContextVar("deadline")
_depth: ContextVar[int] = ContextVar("depth", default=0)


def broken_keywords(values: Iterable[tuple[str, str]], keywords: frozenset[str]) -> tuple[str, ...]:
    """Those of ``keywords`` that values break; none where it cannot be told, or not cheaply.

    ``values`` are pairs of a schema and a value, as JSON text. What is no JSON, as after a stop
    string, is not looked at.
    """
    _deadline.set(time.thread_time() + _MOST_SECONDS)
    broken = (_broken(schema, value, keywords) for schema, value in values)
    return tuple(sorted(frozenset[str]().union(*broken)))


def _broken(schema: str, value: str, keywords: frozenset[str]) -> frozenset[str]:
    try:
        written = json.loads(schema)
        # Other drafts' words for the same.
        written = Rewriter(written, strict=True).rewrite(written)
        validator = _Validator(
            written, registry=Registry(), format_checker=Draft202012Validator.FORMAT_CHECKER
        )
        errors = list(islice(validator.iter_errors(json.loads(value)), _MOST_FAULTS))
    except Exception:  # noqa: BLE001 - a schema that is none may fail in any way
        return frozenset()
    # Paths do not name references, and all else that is held is obeyed.
    found = [next((n for n in _names(error) if n in keywords), "$ref") for error in errors]
    return keywords.intersection(found)


def _names(error: ValidationError) -> Iterator[str]:
    """The names that lead to a fault in the schema, then those of the alternatives' faults."""
    yield from (*map(str, error.absolute_schema_path), str(error.validator))
    for inner in error.context:
        yield from _names(inner)


def _bounded(check: Check) -> Check:
    def run(validator: Any, rule: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
        if time.thread_time() > _deadline.get():
            raise TimeoutError
        if (depth := _depth.get()) == _DEEPEST:
            # Where Python's own limit is reached in a library written in Rust, that panics.
            raise RecursionError
        _depth.set(depth + 1)
        try:
            yield from check(validator, rule, value, schema) or ()
        finally:
            _depth.set(depth)

    return run


def _pattern(_: Any, rule: Any, value: Any, __: Any) -> Iterator[ValidationError]:
    # What RE2 does not know, such as a lookahead, is not checked.
    with suppress(ValueError):
        if isinstance(value, str) and LinearPattern(rule).search(value) is None:
            yield ValidationError("")


def _unique(_: Any, rule: Any, value: Any, __: Any) -> Iterator[ValidationError]:
    # The library compares each item with every other.
    items = value if rule is True and isinstance(value, list) else []
    if len({json.dumps(item, sort_keys=True) for item in items}) < len(items):
        yield ValidationError("")


def _additional(validator: Any, rule: Any, value: Any, schema: Any) -> Any:
    if "patternProperties" in schema:
        return ()
    return Draft202012Validator.VALIDATORS["additionalProperties"](validator, rule, value, schema)


_CHECKS: Final[dict[str, Check]] = {
    **Draft202012Validator.VALIDATORS,
    "pattern": _pattern,
    "uniqueItems": _unique,
    "additionalProperties": _additional,
}
_Validator: Final = validators.create(
    meta_schema=Draft202012Validator.META_SCHEMA,
    validators={
        name: _bounded(check) for name, check in _CHECKS.items() if name not in _WITH_PATTERNS
    },
    type_checker=Draft202012Validator.TYPE_CHECKER,
    format_checker=Draft202012Validator.FORMAT_CHECKER,
)
