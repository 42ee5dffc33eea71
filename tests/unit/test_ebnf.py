"""Grammars as EBNF: which are rejected and why, which are accepted, and that numbers are exact.

Tests in tests/engine show that answers match their schemas. `make test-full` tries more numbers.
"""

import ast
import contextlib
import json
import os
import re
import string
import time
from decimal import Decimal
from enum import Enum
from itertools import pairwise
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from app.llm.ebnf import numbers, regex, writer
from app.llm.ebnf.errors import GrammarError
from app.llm.ebnf.grammars import to_ebnf
from app.llm.protocol import JsonSchemaGrammar, RegexGrammar, Tag, TagsGrammar
from tests.support.ebnf_reader import matches as reads

VOCABULARY = 49_152


def ebnf(schema: Any) -> str:
    """Translate a schema to EBNF."""
    return to_ebnf(JsonSchemaGrammar(schema=json.dumps(schema)), VOCABULARY)


def as_pattern(expression: str) -> re.Pattern[str]:
    """Turn an expression without rules into a Python regular expression."""
    # Outside of strings and classes, blanks only separate.
    parts = re.findall(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\S', expression)
    return re.compile(
        "".join(
            re.escape(ast.literal_eval(p)) if p[0] == '"' else "(?:" if p == "(" else p
            for p in parts
        )
    )


def as_python(node: regex.Node) -> re.Pattern[str]:
    """Turn a parsed regular expression into a Python one, by its canonical spelling."""
    spelled = re.sub(r"\\x\{(\w+)\}", lambda m: f"\\U{int(m[1], 16):08x}", regex.canonical(node))
    return re.compile(spelled)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "integer", "multipleOf": 3, "minimum": 4, "maximum": 5}, "no number"),
        ({"type": "integer", "multipleOf": 9973}, "multipleOf"),
        ({"type": "number", "multipleOf": 0}, "multipleOf"),
        ({"not": {"type": "string"}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "object", "patternProperties": {}}, "patternProperties"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "object", "minProperties": 1, "properties": {"a": {}}}, "minProperties"),
        ({"type": "object", "propertyNames": {"enum": ["a"]}}, "propertyNames"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"type": "string", "contentEncoding": "base64"}, "contentEncoding"),
        ({"type": "string", "nullable": True}, "nullable"),
        ({"type": "string", "format": "iban"}, "iban"),
        ({"allOf": [{"type": "object"}, {"type": "object"}]}, "allOf"),
        ({"oneOf": [{"type": "object"}, {"type": "object"}]}, "oneOf"),
        ({"anyOf": [{"type": "string"}], "minLength": 2}, "anyOf beside minLength"),
        ({"$ref": "#/$defs/gone"}, "names no part"),
        ({"$ref": "https://example.com/schema"}, "leads out"),
        ({"$ref": "#"}, "leads to itself"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "leads to itself"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "leads to itself"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "required"),
        ({"type": "frog"}, "type"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "no number"),
        ({"type": "number", "exclusiveMinimum": 2, "exclusiveMaximum": 2.001}, None),
        ({"type": "number", "minimum": 10**40}, "digits"),
        ({"type": "integer", "minimum": 0.2, "maximum": 0.8}, "no number"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ({"type": "string", "minLength": -1}, "minLength"),
        ({"type": "string", "maxLength": 10_001}, "maxLength"),
        ({"type": "string", "pattern": "a+", "maxLength": 3}, "maxLength beside pattern"),
        ({"type": "string", "pattern": "^a{1,3}$", "maxLength": 3}, None),
        ({"type": "array", "minItems": 10**9}, "minItems"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems"),
        ({"anyOf": [{"type": "array", "minItems": i} for i in range(150)]}, "too many items"),
        ({"anyOf": [{"type": "object", "title": str(i)} for i in range(201)]}, "200 schemas"),
        ({"anyOf": [{"enum": [i]} for i in range(201)]}, None),
        ({"anyOf": [{"items": {"$ref": "#"}} for _ in range(51)]}, "leads back"),
        ({"enum": []}, "no value"),
        ({"enum": ["a"], "type": "integer"}, "no value"),
        ({"enum": 3}, "not a list"),
        ({"type": "string", "format": ["date"]}, "format"),
        ({"required": [["a"]]}, "required is not a list of names"),
        ({"oneOf": [{"required": 3, "type": "object"}] * 2}, "required is not a list"),
        ({"oneOf": [{"properties": 3, "type": "object"}] * 2}, "properties is not an object"),
        (False, "allows no value"),
        (7, "neither an object nor a boolean"),
    ],
)
def test_a_schema_is_enforced_in_full_or_rejected(schema: Any, reason: str | None) -> None:
    """A keyword that would be ignored is named; a schema that no value satisfies is rejected."""
    if reason is None:
        assert ebnf(schema).startswith("root ::= ")
        return
    with pytest.raises(GrammarError, match=re.escape(reason)):
        ebnf(schema)


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str = Field(min_length=1)


class Tree(BaseModel):
    value: float | None = Field(description="Its value", examples=[1.5])
    children: list["Tree"] = []


class Everything(BaseModel):
    colour: Colour
    pet: Cat | Dog = Field(discriminator="kind")
    tree: Tree
    pair: tuple[int, str]
    names: dict[str, int]
    code: str = Field(pattern="^[A-Z]{3}-[0-9]+$")
    anything: Any = None
    nested: list[list[bool]] | None = None


def test_schemas_from_pydantic_are_accepted() -> None:
    """Schemas of the OpenAI client's parse() and LangChain's with_structured_output compile."""
    schema = Everything.model_json_schema()
    assert "root ::= " in ebnf(schema)
    # In the client's strict mode all properties are required, and no others are allowed.
    for part in (schema, *schema["$defs"].values()):
        if part["type"] == "object":
            part |= {"additionalProperties": False, "required": list(part["properties"])}
    assert "root ::= " in ebnf(schema)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(a{1000}){1000}", "more than 128 times"),
        ("((a{100}){100}){100}", "repeats too much"),
        ("(" * 100 + ")" * 100, "nests"),
        ("(a", "open"),
        ("a)", "not open"),
        ("a**", "cannot be repeated"),
        ("*a", "cannot be repeated"),
        ("[z-a]", "range"),
        ("[a", "ends too early"),
        ("[]", "empty"),
        ("a{2,1}", "quantifier"),
        (r"\bword", r"\b"),
        (r"\p{L}", r"\p"),
        (r"(a)\1", r"\1"),
        ("(?=a)b", "looks around"),
        ("(?i)a", "looks around"),
        ("a^b", "anchor"),
        (r"\ud83d", "half a character"),
        ("a" * 10_001, "10000 characters"),
        ("(" * 20 + "){128}" * 20, "repeats too much"),
        ("((a?){50}){50}", "too many ways"),
        ("([a-z]*a[a-z]{20}|[a-z]{3}){1,6}", "too many ways"),
    ],
)
def test_an_unsupported_regular_expression_is_rejected(pattern: str, reason: str) -> None:
    """The error says why the regular expression is rejected."""
    with pytest.raises(GrammarError, match=re.escape(reason)):
        to_ebnf(RegexGrammar(pattern), VOCABULARY)


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("yes|no", ["yes", "no"], ["yesno", ""]),
        ("^(a|b)+?$", ["a", "abba"], ["", "c"]),
        (r"(?:\d{2,3}|x)\.(?P<rest>[^0-9a-]*)", ["12.é!", "x."], ["1.", "x.-", "x.a"]),
        (r"[\]\-^]{2}", ["]-", "^^"], ["a-", "]"]),
        (r"\w\W\s\S\D", ["a- -x", "_!\tab"], ["a- -1", "é- -x"]),
        (r"\x41\u00df\/", ["Aß/"], ["A/"]),
        ("a.c", ["abc", "a😀c"], ["a\nc", "ac"]),
        ("", [""], ["a"]),
    ],
)
def test_a_regular_expression_keeps_its_meaning(
    pattern: str, matches: list[str], others: list[str]
) -> None:
    """The EBNF and the canonical spelling match the same texts as the expression."""
    canonical = as_python(regex.parse(pattern, whole=True))
    grammar = to_ebnf(RegexGrammar(pattern), VOCABULARY)
    for text in matches:
        assert canonical.fullmatch(text)
        assert reads(grammar, text)
    for text in others:
        assert not canonical.fullmatch(text)
        assert not reads(grammar, text)


def expressions(characters: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Regular expressions that match in many ways."""
    counts = st.sampled_from(["*", "+", "?", "{2}", "{0,3}", "{1,}", "{2,4}"])
    return st.recursive(
        characters,
        lambda parts: st.one_of(
            st.lists(parts, min_size=2, max_size=3).map("".join),
            st.lists(parts, min_size=2, max_size=3).map(lambda some: f"({'|'.join(some)})"),
            st.tuples(parts, counts).map(lambda pair: f"({pair[0]}){pair[1]}"),
        ),
        max_leaves=8,
    )


@pytest.mark.no_cover
@given(
    expressions(st.sampled_from(["a", "b", "[ab]", "[b-d]", ".", "ab", '"', "[^a]"])),
    st.lists(st.text('abcd"', max_size=8), min_size=1, max_size=8),
    st.data(),
)
def test_the_automaton_matches_what_the_expression_matches(
    pattern: str, texts: list[str], data: st.DataObject
) -> None:
    """The rules of an ambiguous expression match its texts and no others, in JSON strings too."""
    texts.append(data.draw(st.from_regex(pattern, fullmatch=True, alphabet='abcd"')))
    whole = to_ebnf(RegexGrammar(pattern), 1_000)
    in_string = ebnf({"type": "string", "pattern": f"^({pattern})$"})
    for text in texts:
        expected = bool(re.fullmatch(pattern, text))
        assert reads(whole, text) == expected
        # In a JSON string, large classes leave out the characters that need an escape.
        if '"' not in text:
            assert reads(in_string, json.dumps(text)) == expected


@pytest.mark.parametrize("pattern", [".*a.{20}", "(.{1,20}, )?.{1,20}", "[A-Z].{0,10}[0-9]x*"])
def test_few_ways_need_no_automaton_of_millions_of_states(pattern: str) -> None:
    """Where a deterministic automaton would be too large, the ways to match are followed."""
    grammar = to_ebnf(RegexGrammar(pattern), VOCABULARY)
    for text in ("a" * 21, "aaa, " + "b" * 20, "A12345 78,9", "Ab9xx", "b" * 21, ""):
        assert reads(grammar, text) == bool(re.fullmatch(pattern, text))


_BOUND = st.none() | st.decimals(-2000, 2000, places=2) | st.integers(-300, 300).map(Decimal)


@given(_BOUND, _BOUND, st.integers(-2500, 2500), st.data())
def test_whole_numbers_are_those_between_the_bounds(
    minimum: Decimal | None, maximum: Decimal | None, number: int, data: st.DataObject
) -> None:
    """The expression matches all whole numbers in the bounds and no other, each in one spelling."""
    bounds = numbers.Bounds(minimum=minimum, above=None, below=maximum)
    inside = (minimum is None or number >= minimum) and (maximum is None or number < maximum)
    try:
        pattern = as_python(numbers.integer(bounds))
    except GrammarError:
        assert not inside
        return
    assert bool(pattern.fullmatch(str(number))) == inside
    assert not pattern.fullmatch(f"0{abs(number)}")
    said = data.draw(st.from_regex(pattern, fullmatch=True, alphabet="-0123456789"))
    assert minimum is None or int(said) >= minimum
    assert maximum is None or int(said) < maximum


@pytest.mark.no_cover
@given(_BOUND, _BOUND, st.data())
def test_numbers_are_between_the_bounds(
    minimum: Decimal | None, maximum: Decimal | None, data: st.DataObject
) -> None:
    """The expression matches only numbers in the bounds, spelled as JSON."""
    try:
        expression = numbers.number(numbers.Bounds(above=minimum, maximum=maximum))
    except GrammarError:
        assert minimum is not None
        assert maximum is not None
        assert minimum >= maximum
        return
    said = data.draw(st.from_regex(as_python(expression), fullmatch=True, alphabet="-.0123456789"))
    value = json.loads(said, parse_float=Decimal, parse_int=Decimal)
    assert minimum is None or value > minimum
    assert maximum is None or value <= maximum


@given(st.sets(st.characters(exclude_categories=["Cs"]), min_size=1), st.booleans())
# A class of one character is written as a string, which has shorter escapes.
@pytest.mark.no_cover
@example(characters={"\\"}, negated=False)
@example(characters={'"'}, negated=False)
@example(characters={"\n"}, negated=False)
def test_a_class_matches_its_characters(characters: set[str], negated: bool) -> None:
    """A class matches its characters and no other, also after the library has printed it."""
    ranges = writer.union((ord(c), ord(c)) for c in characters)
    printed = writer.one_of(writer.complement(ranges) if negated else ranges)
    pattern = as_pattern(printed)
    for character in (*characters, "a", "ß", "\x01", "^", "]", "😀"):
        assert bool(pattern.fullmatch(character)) == ((character in characters) != negated)
    # The library prints some characters as \xN, and takes hexadecimal digits after them for N.
    members = [
        ast.literal_eval(f'"{m}"') if m[0] == "\\" else m
        for m in re.findall(r"\\U[0-9a-f]{8}|\\.|.", printed)
    ]
    for first, second in pairwise(members):
        if ord(first) < 0x20 or 0x7F <= ord(first) < 0x100:
            assert second not in string.hexdigits


@pytest.mark.no_cover
def test_a_grammar_is_translated_in_time() -> None:
    """The largest grammars take at most 2 s of processor time, where 0.1 s is usual."""
    tree: Any = {"type": "string"}
    for i in range(9):
        tree = {"anyOf": [{"type": "object", "properties": {f"{s}{i}": tree}} for s in "ab"]}
    kinds = [{"properties": {"k": {"const": i}}, "required": ["k"]} for i in range(77)]
    required = [f"p{i}" for i in range(1000)]
    largest: list[Any] = [
        tree,
        {"enum": [f"value {i}" for i in range(100_000)]},
        {"enum": ["x" * 60 + str(i) for i in range(1000)]},
        {"oneOf": [{"type": "object", **kind} for kind in kinds]},
        {"properties": {name: {"type": "integer"} for name in required}, "required": required},
        {"properties": {name: {"type": "string"} for name in required}},
        {"allOf": [{"anyOf": [{"required": [str(j)]} for j in range(6)]} for _ in range(9)]},
    ]
    texts = [json.dumps(schema) for schema in largest]
    texts += ['{"items":' * 6_000 + "{}" + "}" * 6_000, '{"anyOf":[' * 5_000, "[" * 60_000]
    for text in texts:
        start = time.process_time()
        with contextlib.suppress(GrammarError):
            assert len(to_ebnf(JsonSchemaGrammar(schema=text), VOCABULARY)) < 2 * writer.MAX_TEXT
        assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("least", "most"), [(0, 0), (0, 64), (3, 3), (0, 65), (1, 130), (33, 97), (40, None), (1, None)]
)
def test_a_strings_characters_are_counted(least: int, most: int | None) -> None:
    """A string has as many characters as allowed and no others; an escape is one."""
    bounds = {"minLength": least} if most is None else {"minLength": least, "maxLength": most}
    grammar = ebnf({"type": "string", **bounds})
    for count in {*range(least + 1), *range(62, 67), *range(95, 99), *range(128, 132)}:
        allowed = least <= count and (most is None or count <= most)
        for text in ("a" * count, '"' * count):
            assert reads(grammar, json.dumps(text)) is allowed, count


# With multiples of every step below. Large automata take long where they are measured for coverage.
_NUMBERS = range(-250, 250) if "FULL_SIZE" in os.environ else (*range(-61, 62), *range(248, 253))
_LARGE = [pytest.param(step, marks=pytest.mark.no_cover) for step in ("60", "1000")]


@pytest.mark.parametrize("step", ["1", "5", "2.5", "0.01", "0.25", *_LARGE])
def test_numbers_are_multiples(step: str) -> None:
    """No number that is no multiple is matched, and multiples with few decimals are."""
    grammar = ebnf({"type": "number", "multipleOf": float(step)})
    for number in (*_NUMBERS, *range(10_000, 10_020), 120_000):
        for text in (str(Decimal(number) / 100), str(number)):
            allowed = Decimal(text) % Decimal(step) == 0 and "E" not in text
            assert reads(grammar, text) is allowed, text


def test_all_lengths_share_the_rules_that_count() -> None:
    """Strings of many lengths cost no more together than the longest."""
    texts = [{"type": "string", "minLength": i % 7, "maxLength": 37 * i} for i in range(1, 18)]
    assert ebnf({"type": "array", "prefixItems": texts, "items": False, "minItems": 17})


def test_a_larger_vocabulary_allows_fewer_counted_characters() -> None:
    """The limit on counted characters shrinks with the vocabulary, and is off without one."""
    grammar = JsonSchemaGrammar(schema='{"type": "string", "pattern": "^.{90}$"}')
    assert to_ebnf(grammar, VOCABULARY)
    with pytest.raises(GrammarError, match="too many counted characters"):
        to_ebnf(grammar, 5 * VOCABULARY)
    assert to_ebnf(JsonSchemaGrammar(schema='{"type": "string", "pattern": "^.{120}$"}'), None)


@pytest.mark.parametrize("required", [False, True])
def test_a_tag_has_to_begin_with_the_trigger(required: bool) -> None:
    """A tag that its trigger cannot reach is rejected."""
    grammar = TagsGrammar(tags=[Tag("<b>", "{}", "</b>")], trigger="<a", required=required)
    with pytest.raises(GrammarError, match="trigger"):
        to_ebnf(grammar, VOCABULARY)
