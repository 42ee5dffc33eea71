"""Schemas of real programs fit a grammar; tests/data/program_schemas.py has them."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import jsonschema
import pytest

from app.llm.ebnf.errors import GrammarError
from app.llm.ebnf.fitting import fit
from app.llm.engine.transformers.token_masks import GrammarCompiler
from app.llm.protocol import JsonSchemaGrammar, Tag, TagsGrammar
from tests.data.program_schemas import OLD, schemas
from tests.support.random_answers import grammar_compiler, random_answer

VOCABULARY = 49_152
ALL = dict(schemas())
FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER
# Random text seldom has what these want.
SELDOM = {"zod: ends", "zod: includes"}


def fitted(
    schema: Any, *, strict: bool = False, size: int = VOCABULARY
) -> tuple[Any, frozenset[str]]:
    """A schema that can be compiled, and the keywords that it does not hold."""
    grammar, dropped = fit(JsonSchemaGrammar(json.dumps(schema), strict=strict), size)
    assert isinstance(grammar, JsonSchemaGrammar)
    assert grammar.strict
    return json.loads(grammar.schema), dropped


@cache
def of_program(name: str) -> tuple[Any, frozenset[str]]:
    """What :func:`fitted` returns for a program's schema, which is not strict."""
    return fitted(ALL[name])


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """Compiles grammars for tokens of one byte."""
    return grammar_compiler()


def answers(compiler: GrammarCompiler, schema: Any, count: int) -> Iterator[str]:
    """Random complete answers of a schema."""
    grammar = JsonSchemaGrammar(json.dumps(schema))
    yield from filter(None, (random_answer(compiler, grammar, seed) for seed in range(count)))


def test_there_are_enough_schemas() -> None:
    """The set is as large as the one in which half of the programs' schemas were refused."""
    assert len(ALL) >= 131


@pytest.mark.no_cover
@pytest.mark.parametrize("name", ALL)
def test_a_programs_schema_is_taken(compiler: GrammarCompiler, name: str) -> None:
    """A schema that is not strict is never refused; of one that is held, every answer is valid."""
    schema, dropped = of_program(name)
    fitted(schema, strict=True)
    held = schema if dropped or name in OLD else ALL[name]
    said = list(answers(compiler, schema, 2))
    for answer in said:
        assert isinstance(json.loads(answer), dict)
        jsonschema.validate(json.loads(answer), held, format_checker=FORMATS)
    assert said or name in SELDOM


def tag(schema: Any, *, strict: bool = False) -> Tag:
    """A part of an answer between brackets."""
    return Tag("<a>", json.dumps(schema), "</a>", strict=strict, where="tools.3")


def test_a_strict_part_is_refused_beside_others() -> None:
    """Of two parts with a keyword that is not held, the strict one is refused with its place."""
    schema = {"type": "object", "properties": {"a": {"items": {"uniqueItems": True}}}}
    grammar = TagsGrammar([tag({"uniqueItems": True}), tag(schema, strict=True)], "<")
    with pytest.raises(GrammarError, match="uniqueItems") as refused:
        fit(grammar, VOCABULARY)
    assert refused.value.where == "tools.3.properties.a.items"


def test_parts_share_the_limits() -> None:
    """Of many parts those that exceed a limit together are widened, and the rest is held."""
    schemas = [{"type": "string", "pattern": f"^.{{{40 + i}}}$"} for i in range(9)]
    grammar, dropped = fit(TagsGrammar([tag(s) for s in schemas], "<"), VOCABULARY)
    assert isinstance(grammar, TagsGrammar)
    kept = [json.loads(part.schema) for part in grammar.tags]
    assert dropped == {"pattern"}
    assert kept[0] == schemas[0]
    assert kept[-1] == {"type": "string"}
    assert all(part.strict for part in grammar.tags)


@pytest.mark.no_cover
@pytest.mark.parametrize("size", [pytest.param(151_936, marks=pytest.mark.full_size), 262_144])
def test_programs_schemas_are_held_with_any_vocabulary(size: int) -> None:
    """The more tokens there are, the fewer characters may be counted; one string always may be."""
    long = {"type": "string", "minLength": 500, "maxLength": 2_000}
    assert fitted(long, size=size)[1] == set()
    different = [n for n, s in ALL.items() if fitted(s, size=size)[1] != of_program(n)[1]]
    assert different == []


@pytest.mark.parametrize(
    ("schema", "widened", "keywords"),
    [
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "anyOf", {"oneOf"}),
        ({"type": "string", "minLength": 2, "maxLength": 10_001}, "minLength", {"maxLength"}),
        ({"type": "string", "format": "date", "pattern": "^1"}, "pattern", {"format"}),
        ({"type": "array", "items": {"type": "null"}, "maxItems": 9999}, "items", {"maxItems"}),
        ({"type": "object", "properties": {}, "required": 3}, "type", {"properties", "required"}),
        ({"enum": [1], "minimum": 3}, "enum", {"minimum"}),
        ({"enum": 5}, None, {"enum"}),
        ({"type": ["frog"]}, None, {"type"}),
        ({"$ref": "#"}, None, {"$ref"}),
        (7, None, set()),
        (False, None, set()),
    ],
)
def test_only_what_is_not_held_is_widened(
    schema: Any, widened: str | None, keywords: set[str]
) -> None:
    """The rest of a part stays, then its type, then any JSON; dropped keywords are named."""
    found, dropped = fitted(schema)
    assert dropped == keywords
    if widened is None:
        assert found in (True, {})
    else:
        assert widened in found


def test_names_of_the_callers_own_are_not_told() -> None:
    """A keyword that means nothing is not named: a header has no text that a caller chooses."""
    strange = {"a\r\nSet-Cookie: b": 1, "not": {"const": 1}}
    for schema in ({"default": strange, "items": {"$ref": "#/default"}}, {"items": strange}):
        assert fitted(schema)[1] == {"not"}


ANY_OR_NULL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
A: Any = {"a": {}}
B: Any = {"b": {}}
AB: Any = A | B
EQUAL: list[tuple[Any, Any]] = [
    ({"type": "string", "nullable": True}, {"type": ["string", "null"]}),
    ({"enum": ["a"], "nullable": True}, {"enum": ["a", None]}),
    ({"const": 1, "nullable": True}, {"anyOf": [{"const": 1}, {"type": "null"}]}),
    ({"anyOf": [{"type": "string"}], "nullable": True}, ANY_OR_NULL),
    ({"nullable": True}, {}),
    ({"minimum": 1, "exclusiveMinimum": True}, {"exclusiveMinimum": 1}),
    ({"items": [{}], "additionalItems": False}, {"prefixItems": [{}], "items": False}),
    ({"allOf": [{"type": "null"}, {"description": "x"}]}, {"allOf": [{"type": "null"}]}),
    ({"type": "string", "format": "password"}, {"type": "string"}),
    ({"type": "string", "pattern": None, "enum": None}, {"type": "string"}),
    (
        {"items": {"enum": ["a", "b"]}, "uniqueItems": True, "minItems": 1},
        {"enum": [["a"], ["b"], ["a", "b"], ["b", "a"]]},
    ),
    ({"enum": ["a", "long"], "maxLength": 3}, {"enum": ["a"]}),
    (
        {"properties": {"a": {}, "b": {}}, "minProperties": 1},
        {"anyOf": [{"properties": AB, "required": ["a"]}, {"properties": B, "required": ["b"]}]},
    ),
    (
        {"properties": {"a": {}, "b": {}}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"anyOf": [{"properties": A, "required": ["a"]}, {"properties": B, "required": ["b"]}]},
    ),
    (
        {"type": "object", "propertyNames": {"enum": ["a"]}, "additionalProperties": {}},
        {"type": "object", "properties": {"a": {}}, "additionalProperties": False},
    ),
]


@pytest.mark.parametrize(("schema", "equal"), EQUAL)
def test_what_has_an_equal_is_held_strictly(schema: Any, equal: Any) -> None:
    """What another dialect writes is replaced by its equal, in a strict schema too."""
    assert fitted(schema, strict=True) == (equal, frozenset())
