"""Answers are checked against the keywords that no grammar holds, whatever the schema."""

import json
import sys
import time
from types import FrameType
from typing import Any

import pytest

from app.llm.ebnf.validation import broken_keywords


def broken(schema: Any, value: Any, *keywords: str) -> set[str]:
    """The keywords that a value breaks."""
    values = [(json.dumps(schema), json.dumps(value))]
    return set(broken_keywords(values, frozenset(keywords)))


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"not": {"const": 1}}, 2, 1),
        ({"uniqueItems": True}, [1, True, "1", {"a": 1}], [{"a": 1, "b": 2}, {"b": 2, "a": 1}]),
        ({"contains": {"const": 1}}, [2, 1], [2]),
        ({"dependentRequired": {"a": ["b"]}}, {"a": 1, "b": 1}, {"a": 1}),
        ({"maxProperties": 1}, {"a": 1}, {"a": 1, "b": 1}),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, 1.5, 1),
        ({"pattern": "^(a|b)+$"}, "abab", "abc"),
        ({"format": "ipv4"}, "127.0.0.1", "300.0.0.1"),
    ],
)
def test_a_broken_keyword_is_named(schema: dict[str, Any], good: Any, bad: Any) -> None:
    """A value that breaks a keyword is told apart from one that does not, at any depth."""
    (name,) = schema
    within = {"properties": {"x": {"anyOf": [schema, {"const": None}]}}}
    referred = {"$defs": {"d": schema}, "items": {"$ref": "#/$defs/d"}}
    for outer, wrap in (
        (schema, lambda v: v),
        (within, lambda v: {"x": v}),
        (referred, lambda v: [v]),
    ):
        assert broken(outer, wrap(good), name) == set()
        assert broken(outer, wrap(bad), name) == {name}


def test_a_conditional_is_checked() -> None:
    """What breaks the one branch that holds is told by the branch's name."""
    schema = {"if": {"required": ["a"]}, "then": {"required": ["b"]}, "else": {"required": ["c"]}}
    names = ("if", "then", "else")
    assert broken(schema, {"a": 1, "b": 1}, *names) == set()
    assert broken(schema, {"a": 1}, *names) == {"then"}
    assert broken(schema, {}, *names) == {"else"}


def test_words_of_other_drafts_are_understood() -> None:
    """A value is not faulted for what OpenAPI and older drafts allow by other words."""
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "STRING", "nullable": True},
            "b": {"type": "integer", "minimum": 1, "exclusiveMinimum": True},
            "c": {"items": [{"type": "string"}], "additionalItems": False},
        },
        "not": {"required": ["z"]},
    }
    assert broken(schema, {"a": None, "b": 2, "c": ["x"]}, "not", "type") == set()
    assert broken(schema, {"a": None, "z": 1}, "not", "type") == {"not"}


EVIL = "a" * 40 + "!"
DEEP: dict[str, Any] = {
    f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2, "not": {"const": 2}} for i in range(60)
}


@pytest.mark.parametrize(
    ("schema", "value", "keyword"),
    [
        ({"pattern": "^(a+)+(?=x)$"}, EVIL, "pattern"),
        ({"patternProperties": {"^(a+)+$": False}}, {EVIL: 1}, "patternProperties"),
        (
            {"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False},
            {EVIL: 1},
            "additionalProperties",
        ),
        (
            {"patternProperties": {"^(a+)+$": {}}, "unevaluatedProperties": False},
            {EVIL: 1},
            "unevaluatedProperties",
        ),
        ({"$defs": DEEP | {"d60": {"const": 1}}, "$ref": "#/$defs/d0"}, 2, "not"),
        ({"uniqueItems": True, "items": {"uniqueItems": True}}, [[]] * 100_000, "uniqueItems"),
        ({"$ref": "#", "not": {}}, 1, "not"),
        ({"$ref": "http://localhost:9/schema", "not": {}}, 1, "not"),
        ({"$dynamicRef": "#x", "not": {}}, 1, "not"),
        ({"enum": 5, "not": {"const": 1}}, 1, "not"),
        ({"type": ["wizard"], "not": {"const": 1}}, 1, "not"),
        ({"minimum": "x", "not": {"const": 1}}, 1, "not"),
    ],
)
def test_what_is_not_cheap_is_not_checked(schema: Any, value: Any, keyword: str) -> None:
    """Patterns without end, references without end or to elsewhere, and no schema: no result."""
    began = time.thread_time()
    assert broken(schema, value, keyword) == set()
    # The bound is 0.2 s of processor time; a test's margin is tenfold.
    assert time.thread_time() - began < 2


def test_a_reference_to_itself_ends_before_python_does() -> None:
    """Python's own limit panics, which is no Exception, where a library in Rust reaches it."""
    depths = [0]

    def called(frame: FrameType | None, *_: Any) -> None:
        depth = 0
        while frame := frame and frame.f_back:
            depth += 1
        depths.append(depth)

    sys.setprofile(called)
    try:
        found = broken({"$ref": "#", "not": {}}, 1, "not")
    finally:
        sys.setprofile(None)
    assert found == set()
    assert 200 < max(depths) - min(depths[1:]) < 500


def test_nested_values_are_checked() -> None:
    """Forty objects within each other are not too deep."""
    schema: dict[str, Any] = {"not": {"const": 1}}
    value: Any = 1
    for _ in range(40):
        schema, value = {"properties": {"a": schema}}, {"a": value}
    assert broken(schema, value, "not") == {"not"}


def test_a_simple_pattern_is_linear() -> None:
    """A pattern that takes exponential time elsewhere is checked."""
    assert broken({"pattern": "^(a+)+$"}, EVIL, "pattern") == {"pattern"}
    assert broken({"pattern": "^(a+)+$"}, EVIL[:-1], "pattern") == set()


def test_a_pattern_that_cannot_be_run_hides_nothing() -> None:
    """Beside a pattern that is not checked, the other keywords are."""
    schema = {"properties": {"a": {"pattern": "(?=x)"}}, "not": {"required": ["b"]}}
    assert broken(schema, {"a": "y", "b": 1}, "pattern", "not") == {"not"}


def test_an_unfinished_value_is_not_checked() -> None:
    """What is no JSON, as after a stop string, breaks nothing."""
    assert broken_keywords([('{"not": {}}', '{"a"')], frozenset(("not",))) == ()


def test_the_values_of_an_answer_share_the_time() -> None:
    """Many calls take no longer than one, and what the first ones break is told."""
    costly = {"$defs": DEEP | {"d60": {"const": 1}}, "$ref": "#/$defs/d0"}
    values = [('{"maxProperties": 0}', '{"a": 1}'), *[(json.dumps(costly), "2")] * 50]
    began = time.thread_time()
    assert broken_keywords(values, frozenset(("not", "maxProperties"))) == ("maxProperties",)
    assert time.thread_time() - began < 2
