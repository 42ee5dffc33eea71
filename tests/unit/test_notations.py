"""Arguments in the notations of Qwen 3.5 and Gemma 4: written, and read however they are cut."""

import json
from itertools import islice, pairwise
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.llm import notations
from app.llm.ebnf.fitting import fit
from app.llm.engine.transformers.token_masks import GrammarCompiler
from app.llm.protocol import Notation, TagsGrammar
from app.llm.tool_calls import read_calls
from app.llm.tool_formats import tool_format
from app.llm.tools import Tool, ToolUse
from tests.data.call_templates import GEMMA4, QWEN35
from tests.data.program_schemas import schemas
from tests.support.random_answers import grammar_compiler, random_answer

_TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    [
        "</tool_call>",
        "<parameter=a>",
        "}",
        '"',
        "\\",
        "1",
        "true",
        "\n",
        " x ",
        "</parameter>",
        '<|"|',
    ]
)
_NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_.-]{0,6}", fullmatch=True)
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=3),
    max_leaves=6,
)
_KINDS = {dict: "object", list: "array", bool: "boolean", str: "string", int: "integer"}


def read(
    notation: Notation, schema: dict[str, Any], text: str, places: list[int]
) -> tuple[str, str, bool]:
    """The JSON of arguments that are cut at these places, what is left, and whether they ended."""
    reader = notations.reader(notation, schema)
    bounds = sorted({0, len(text), *(p % (len(text) + 1) for p in places)})
    told = held = ""
    for start, end in pairwise(bounds):
        held += text[start:end]
        part, length = reader.feed(held)
        told, held = told + part, held[length:]
    return told, held, reader.ended


@pytest.mark.parametrize(("notation", "foot"), [("xml", "</function>"), ("gemma", "}")])
@settings(max_examples=40)
@given(given_=st.dictionaries(_NAMES, _VALUES, max_size=3), places=st.lists(st.integers(0, 999)))
def test_what_is_written_is_read(
    notation: Notation, foot: str, given_: dict[str, Any], places: list[int]
) -> None:
    """Arguments come back as they were, and what follows them is left, however they are cut."""
    if notation == "xml":
        # Text in lists and objects is JSON; one that stands alone must not have the mark.
        given_ = {k: v for k, v in given_.items() if "\n</parameter>" not in f"\n{v}"}
    kinds = {k: {"type": _KINDS.get(type(v), "number")} for k, v in given_.items() if v is not None}
    text = notations.written(notation, json.dumps(given_))
    told, left, ended = read(notation, {"properties": kinds}, text + foot, places)
    assert json.loads(told) == given_
    assert (left, ended) == (foot, True)


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, "True", "True"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": "boolean"}, "True", True),
        ({"type": ["string", "null"]}, "None", None),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"type": "string", "nullable": True}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "number"}]}, "5.5", 5.5),
        ({"anyOf": [{"$ref": "#/$defs/code"}, {"type": "null"}]}, "5", "5"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({}, "5", 5),
        ({}, "NaN", "NaN"),
        ({}, "text", "text"),
        ({"$ref": "#/$defs/gone"}, "[1]", [1]),
        ({"type": "array"}, '[\n  "a"\n]', ["a"]),
    ],
)
def test_a_schema_tells_the_type_of_a_bare_value(
    schema: dict[str, Any], written: str, value: Any
) -> None:
    """Qwen's values have no quotes: a text stays one where the schema wants one."""
    whole = {"properties": {"a": schema}, "$defs": {"code": {"type": "string"}}}
    text = f"<parameter=a>\n{written}\n</parameter>\n</function>"
    for places in ([], list(range(len(text)))):
        told, left, _ = read("xml", whole, text, places)
        assert (json.loads(told), left) == ({"a": value}, "</function>")


@pytest.mark.parametrize(
    ("notation", "text", "told"),
    [
        ("xml", "<parameter=a>1</parameter><parameter=b>x</parameter></", {"a": 1, "b": "x"}),
        ("xml", "\n\n<parameter=a>\n</parameter>\n\n</function>", {"a": ""}),
        ("xml", "</tool_call>", {}),
        ("gemma", " a : 1 , b : None , c:[ True ] }", {"a": 1, "b": None, "c": [True]}),
        ("gemma", '<|"|>a b<|"|>:{c:word}}', {"a b": {"c": "word"}}),
    ],
)
def test_other_spellings_are_read(notation: Notation, text: str, told: dict[str, Any]) -> None:
    """Arguments on one line, without a value, or with blanks, quotes and words are read too."""
    for places in ([], list(range(len(text)))):
        assert json.loads(read(notation, {}, text, places)[0]) == told


def test_a_text_is_passed_on_as_it_comes() -> None:
    """A string is told piece by piece, but for what may be the mark behind it."""
    reader = notations.reader("xml", {"properties": {"a": {"type": "string"}}})
    assert reader.feed('<parameter=a>\nIt "is"\n') == ('{"a": "It \\"is\\"', 21)
    assert reader.feed("\n</para") == ("", 0)
    assert reader.feed("\n</paragraph") == ("\\n</paragraph", 12)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """Compiles grammars for tokens of one byte."""
    return grammar_compiler()


@pytest.mark.parametrize("template", [QWEN35, GEMMA4], ids=["xml", "gemma"])
def test_every_call_follows_a_programs_schema(compiler: GrammarCompiler, template: str) -> None:
    """No schema of a program is refused, and random calls, read back, are valid under it."""
    form = tool_format(template)
    read_back = 0
    for i, (name, schema) in enumerate(islice(schemas(), 0, None, 16)):
        use = ToolUse((Tool("f", None, schema),), "required", parallel=False)
        grammar, _ = fit(form.grammar(use), None)
        assert isinstance(grammar, TagsGrammar)
        if (answer := random_answer(compiler, grammar, i, '"}],<\n/>|', 0.5)) is None:
            continue
        said, (call,) = read_calls(answer, form, {"f": schema})
        assert said == "", name
        held = json.loads(grammar.tags[0].schema)
        jsonschema.Draft202012Validator(held).validate(json.loads(call["arguments"]))
        read_back += 1
    assert read_back > 5
