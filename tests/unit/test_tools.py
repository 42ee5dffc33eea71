"""Tools: the prompt that describes them, and calls that are parsed however they are cut."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.llm.protocol import JsonSchemaGrammar
from app.llm.tool_calls import CallPiece, Piece, ToolCallParser
from app.llm.tool_formats import DEFAULT_FORMAT, tool_format
from app.llm.tools import ChatMessage, Tool, ToolCall, ToolFormat, ToolUse
from tests.data import call_templates, chat_templates

HERMES = tool_format("{% if tools %}<tool_call>{{ tools }}</tool_call>{% endif %}")
LLAMA = tool_format('{% if tools %}<|start_header_id|>{"name": x, "parameters": y}{% endif %}')
# The schemas of the functions that may be called.
NAMES: dict[str, dict[str, Any]] = {"add": {}, "get-weather_2": {}}

arguments = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(alphabet=st.characters(codec="utf-8"), max_size=8)
        | st.sampled_from(["</tool_call>", '{"name": "', "}", '"', "\\"]),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=6,
    ),
    max_size=3,
)
calls_of = st.lists(st.tuples(st.sampled_from(sorted(NAMES)), arguments), max_size=3)
plain = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<{;"), max_size=20).map(
    str.strip
)


def read(form: ToolFormat, pieces: list[str]) -> list[Piece]:
    """All pieces that a parser makes of an answer."""
    parser = ToolCallParser(form, NAMES)
    found = [piece for text in pieces for piece in parser.feed(text)] + parser.flush()
    assert parser.calls == len({p.index for p in found if isinstance(p, CallPiece)})
    return found


def joined(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    """The text of an answer, and the name and arguments of each call."""
    text = "".join(p for p in pieces if isinstance(p, str))
    calls: list[list[str]] = []
    ids: list[str] = []
    for piece in pieces:
        if not isinstance(piece, CallPiece):
            continue
        if piece.name is not None:
            assert piece.id
            ids.append(piece.id)
            calls.append([piece.name, ""])
        assert piece.index == len(calls) - 1
        calls[-1][1] += piece.arguments
    assert len(set(ids)) == len(calls)
    return text, [(name, given_) for name, given_ in calls]


def cut(text: str, places: list[int]) -> list[str]:
    """``text`` cut into pieces."""
    bounds = sorted({0, len(text), *(p % (len(text) + 1) for p in places)})
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


def message(text: str, calls: list[tuple[str, Any]]) -> ChatMessage:
    """A message of the assistant in the form that callers send."""
    written: list[ToolCall] = [
        {
            "id": f"call_{i}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(given_, ensure_ascii=False)},
        }
        for i, (name, given_) in enumerate(calls)
    ]
    return {"role": "assistant", "content": text, "tool_calls": written}


MISTRAL = tool_format("{% if tools %}[TOOL_CALLS]{% endif %}")
MISTRAL_ARGS = tool_format("{% if tools %}[TOOL_CALLS][ARGS]{% endif %}")
QWEN35 = tool_format(call_templates.QWEN35)
GEMMA3 = tool_format(chat_templates.GEMMA3)
GEMMA4 = tool_format(call_templates.GEMMA4)
ALL = {
    "default": DEFAULT_FORMAT,
    "gemma 3": GEMMA3,
    "deepseek r1": tool_format(call_templates.DEEPSEEK_R1),
    "deepseek v3.1": tool_format(call_templates.DEEPSEEK31),
    "gpt-oss": tool_format(call_templates.GPT_OSS),
    "hermes": HERMES,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mistral args": MISTRAL_ARGS,
}


@pytest.mark.parametrize("form", ALL.values(), ids=ALL)
@given(text=plain, calls=calls_of, places=st.lists(st.integers(0, 10_000), max_size=30))
def test_what_is_written_is_read(
    form: ToolFormat, text: str, calls: list[tuple[str, Any]], places: list[int]
) -> None:
    """A caller's calls, written as the model writes them, are parsed however they are cut."""
    (written,) = form.as_text([message(text, calls)])
    assert "tool_calls" not in written or not calls
    read_text, read_calls = joined(read(form, cut(written["content"], places)))
    assert read_text == text
    # A repeated call ends the answer.
    texts = [(name, json.dumps(given_)) for name, given_ in calls]
    new = next((i for i, call in enumerate(texts) if call in texts[:i]), len(calls))
    calls = calls[:new]
    assert [(name, json.loads(given_)) for name, given_ in read_calls] == calls


ODD = [
    ("default", "no call <b>at all</b> \n"),
    ("default", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
    ("default", '<tool_call> {"arguments": {}, "name": "add"} </tool_call>'),
    ("default", "<tool_call>[1, 2]</tool_call> and <tool_cal"),
    ("default", '<tool_call>\n{"name": "add", "arg'),
    ("default", '<tool_call>\n{"name": "' + "x" * 300),
    ("default", "   "),
    ("llama", '{"name": "unknown", "parameters": {}} \n'),
    ("llama", '{"names": ["add"]}'),
    ("mistral", '[TOOL_CALLS] [{"name": "unknown", "arguments": {}}]'),
    ("mistral", "[TOOL_CALLS] [1]"),
    ("mistral", "[TOOL_CALLS"),
    ("mistral args", "[TOOL_CALLS]unknown[ARGS]{}"),
    ("mistral args", "[TOOL_CALLS]add and [ARGS]"),
]


@pytest.mark.parametrize(("form", "text"), ODD)
def test_other_text_stays_text(form: str, text: str) -> None:
    """Text that only resembles a call of a known function is passed on unchanged."""
    for size in (1, 2, 7, len(text)):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert joined(read(ALL[form], pieces)) == (text, [])


def test_truncated_arguments_are_passed_on() -> None:
    """Arguments that max_tokens truncates are passed on as far as they go."""
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b'
    assert joined(read(DEFAULT_FORMAT, list(text))) == ("", [("add", '{"a": 1, "b')])


def test_white_space_is_that_of_json() -> None:
    """Control characters that only Python takes for white space are part of the arguments."""
    text = '<tool_call>\n{"name": "add", "arguments": \x1e\n{"a": 1}}\n</tool_call>'
    whole = joined(read(DEFAULT_FORMAT, [text]))
    assert whole == ("", [("add", '\x1e\n{"a": 1}')])
    assert joined(read(DEFAULT_FORMAT, list(text))) == whole


def test_arguments_come_in_pieces() -> None:
    """A call's name is passed on as soon as it is known, and its arguments as they arrive."""
    parser = ToolCallParser(DEFAULT_FORMAT, NAMES)
    assert parser.feed('<tool_call>\n{"name": "add"') == []
    (begun,) = parser.feed(', "arguments": ')
    assert isinstance(begun, CallPiece)
    assert (begun.index, begun.name, begun.arguments) == (0, "add", "")
    assert parser.feed('{"a":') == [CallPiece(0, arguments='{"a":')]
    assert parser.feed(" 1}}\n</tool") == [CallPiece(0, arguments=" 1}")]
    assert parser.feed("_call>\n") == []
    assert parser.flush() == []


def test_white_space_around_calls_is_dropped() -> None:
    """White space between text and calls belongs to the format, and is dropped."""
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    other = call.replace("{}", '{"a": 1}')
    text = f"Before.\n{call}\n{other}\n\nAfter. "
    found = ("Before.After. ", [("add", "{}"), ("add", '{"a": 1}')])
    assert joined(read(DEFAULT_FORMAT, list(text))) == found


def hermes(name: str, given_: str) -> str:
    """A call as Hermes writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {given_}}}\n</tool_call>'


def test_a_repeated_call_ends_the_answer() -> None:
    """A call like an earlier one, and what follows, is not passed on, wherever it is cut."""
    calls = [("add", '{"a": 1}'), ("add", '{"a": 12}'), ("get-weather_2", '{"a": 1}')]
    text = "\n".join(hermes(*call) for call in calls)
    tail = f"\n{hermes(*calls[1])}\n{hermes('add', '{}')} and text"
    for size in (1, 2, 7, 50, 500):
        parser = ToolCallParser(DEFAULT_FORMAT, NAMES)
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        found = [piece for part in pieces for piece in parser.feed(part)]
        before = parser.repeats
        found += [piece for part in tail for piece in parser.feed(part)] + parser.flush()
        assert (before, parser.repeats) == (False, True)
        assert parser.calls == len(calls)
        assert joined(found) == ("", calls)


def test_what_may_become_a_repetition_is_held_back_no_longer_than_that() -> None:
    """A call is passed on from where it differs from all earlier ones, or where it is cut off."""
    parser = ToolCallParser(DEFAULT_FORMAT, NAMES)
    parser.feed(hermes("add", '{"a": 12}'))
    assert parser.feed('<tool_call>\n{"name": "add", "arguments": {"a": 1') == []
    assert [p.arguments for p in parser.feed("3") if isinstance(p, CallPiece)] == [
        "",
        '{"a": 1',
        "3",
    ]
    cut_off = ToolCallParser(DEFAULT_FORMAT, NAMES)
    cut_off.feed(hermes("add", '{"a": 12}'))
    assert cut_off.feed('<tool_call>\n{"name": "add", "arguments": {"a": 1') == []
    assert [p.arguments for p in cut_off.flush() if isinstance(p, CallPiece)] == ["", '{"a": 1']


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        {},
        {"type": "object"},
        {"type": "object", "properties": {}},
        {"type": "object", "properties": {}, "required": [], "additionalProperties": False},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "title": "F"},
    ],
)
def test_a_tool_without_parameters_is_called_with_nothing(parameters: dict[str, Any]) -> None:
    """The grammar of a function whose schema lists no members allows ``{}`` alone."""
    (tag,) = DEFAULT_FORMAT.grammar(ToolUse((Tool("now", None, parameters),))).tags
    closed = {"type": "object", "properties": {}, "additionalProperties": False}
    assert json.loads(tag.schema) == closed


def test_a_tool_with_any_arguments_keeps_them() -> None:
    """A schema that allows any members is not taken for one without members."""
    for more in ({"additionalProperties": True}, {"required": ["a"]}, {"$ref": "#/$defs/a"}):
        parameters = {"type": "object", **more}
        (tag,) = DEFAULT_FORMAT.grammar(ToolUse((Tool("f", None, parameters),))).tags
        assert json.loads(tag.schema) == parameters


def test_an_answer_without_calls_may_have_a_form() -> None:
    """With auto an answer is calls or of the form; where a call is forced, it is calls alone."""
    form = JsonSchemaGrammar('{"type": "boolean"}')
    auto = DEFAULT_FORMAT.grammar(ToolUse((ADD, NOW)), form)
    assert (auto.required, auto.otherwise) == (True, form)
    for choice in ("required", "=add"):
        forced = DEFAULT_FORMAT.grammar(ToolUse((ADD, NOW), choice), form)
        assert (forced.required, forced.otherwise) == (True, None)


ADD = Tool("add", "Adds.", {"type": "object", "properties": {"a": {"type": "integer"}}})
NOW = Tool("now")


@pytest.mark.parametrize(
    ("use", "names", "required", "single"),
    [
        (ToolUse((ADD, NOW)), ["add", "now"], False, False),
        (ToolUse((ADD, NOW), parallel=False), ["add", "now"], False, True),
        (ToolUse((ADD, NOW), "required"), ["add", "now"], True, False),
        (ToolUse((ADD, NOW), "=now"), ["now"], True, True),
    ],
)
def test_a_choice_is_a_grammar(
    use: ToolUse, names: list[str], required: bool, single: bool
) -> None:
    """The grammar says which functions may be called, whether one must be, and how often."""
    grammar = DEFAULT_FORMAT.grammar(use)
    assert [t.name for t in use.allowed] == names
    assert [t.begin for t in grammar.tags] == [
        f'<tool_call>\n{{"name": "{name}", "arguments": ' for name in names
    ]
    assert all(t.begin.startswith(grammar.trigger) for t in grammar.tags)
    assert (grammar.required, grammar.single) == (required, single)
    assert json.loads(grammar.tags[-1].schema)["type"] == "object"


def test_a_template_without_tools_gets_instructions() -> None:
    """The system message describes the tools, and results become one message of the user."""
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "?"},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    system, question, results = DEFAULT_FORMAT.for_template(messages, [ADD])
    assert system["content"].startswith("Be brief.\n\n")
    assert json.dumps(ADD.definition()) in system["content"]
    assert question["content"] == "?"
    assert results["role"] == "user"
    assert results["content"] == (
        "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    )
    alone = DEFAULT_FORMAT.for_template([{"role": "user", "content": "?"}], [NOW])
    assert [m["role"] for m in alone] == ["system", "user"]
    assert DEFAULT_FORMAT.for_template(messages[:2], []) == messages[:2]


def test_the_format_of_a_template_is_recognised() -> None:
    """Known formats are recognised; other templates get the default format."""
    assert HERMES.in_template
    assert LLAMA.in_template
    assert LLAMA.trigger == '{"name": "'
    assert HERMES.for_template([{"role": "tool", "content": "x"}], [ADD])[0]["role"] == "tool"
    for template in (
        "{{ messages }}<tool_call>",
        # The tags of Qwen 3.5 and Hermes in other forms, and Gemma with calls of another form.
        "{% if tools %}<tool_call><function=f></tool_call>{% endif %}",
        "{% if tools %}<tool_call>f<arg_key></tool_call>{% endif %}",
        "{% if tools %}<start_of_turn><start_function_call>{% endif %}",
    ):
        assert tool_format(template) is DEFAULT_FORMAT


def test_a_template_that_knows_of_tools_is_not_told_again() -> None:
    """DeepSeek's templates are told of tools in its own form, unless they tell the model."""
    (system, _) = ALL["deepseek v3.1"].for_template([{"role": "user", "content": "?"}], [ADD])
    first, last, begin, end, sep = call_templates.CALL_TOKENS
    assert f"{first}{begin}tool_call_name{sep}tool_call_arguments{end}{last}" in system["content"]
    assert json.dumps(ADD.parameters) in system["content"]
    knows = tool_format(call_templates.DEEPSEEK31 + "{{ tools }}")
    asked = [{"role": "user", "content": "?"}, {"role": "tool", "content": "x"}]
    assert knows.for_template(asked, [ADD]) == asked
    assert knows.trigger == ALL["deepseek v3.1"].trigger


def test_gemma_3_is_told_of_tools_and_results_in_its_authors_form() -> None:
    """Google's form of a call is in the instructions, and a result is a block of the user's."""
    asked = [{"role": "user", "content": "?"}, {"role": "tool", "content": "x"}]
    system, _, result = GEMMA3.for_template(asked, [ADD])
    assert '{"name": function name, "parameters": dictionary' in system["content"]
    assert result == {"role": "user", "content": "```tool_output\nx\n```"}
    fenced = 'So: ```json\n{"name": "add", "parameters": {}}\n```'
    assert joined(read(GEMMA3, list(fenced))) == ("So:", [("add", "{}")])
    other = '```json\n{"a": 1}\n``` and ```js'
    assert joined(read(GEMMA3, list(other))) == (other, [])
