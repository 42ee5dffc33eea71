"""Each model's own format of calls, from its template: the prompt, and calls read out of tokens."""

import json
from typing import Any, cast

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from app.llm.answer_text import AnswerText
from app.llm.client.place import Place
from app.llm.protocol import TokenEvent
from app.llm.tokenizer import PromptTokenizer
from app.llm.tool_calls import CallPiece, ToolCallParser
from app.llm.tool_formats import tool_format
from app.llm.tools import ChatMessage, ToolCall, ToolFormat
from tests.support.calling_models import CALLS, GIVEN, MARKS, MODELS, TOOLS, Model
from tests.support.scripted import described


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    """Each model."""
    return MODELS[request.param]


@pytest.fixture(scope="module")
def tokenizer(model: Model) -> PromptTokenizer:
    """Its tokenizer, which has a token for each byte."""
    return PromptTokenizer(described(model.template, model.special, model.plain))


def read(tokenizer: PromptTokenizer, pieces: list[list[int]]) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls of an answer whose tokens come in these pieces."""
    place = cast("Place", None)
    text = AnswerText(tokenizer, place, (), with_logprobs=False, thinking=None, with_calls=True)
    parser = ToolCallParser(tokenizer.tool_format, {tool.name: tool.schema for tool in TOOLS})
    said, calls = "", list[list[str]]()
    found = [p for ids in pieces for p in parser.feed(text.add(TokenEvent("1", ids)))]
    for piece in (*found, *parser.flush()):
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                calls.append([piece.name, ""])
            calls[piece.index][1] += piece.arguments
        else:
            said += cast("str", piece)
    return said, [(name, arguments) for name, arguments in calls]


def parsed(found: tuple[str, list[tuple[str, str]]]) -> tuple[str, list[tuple[str, Any]]]:
    """The same with the values of the arguments."""
    return found[0], [(name, json.loads(arguments)) for name, arguments in found[1]]


@pytest.mark.no_cover
def test_calls_are_read_wherever_the_answer_is_cut(
    model: Model, tokenizer: PromptTokenizer
) -> None:
    """The calls that a model writes are found whole, byte by byte, and cut in two at each byte."""
    encode = tokenizer.decoder.encode
    ids = encode(f"I look.\n{model.written}", add_special_tokens=False).ids
    expected = ("I look.", CALLS)
    assert parsed(read(tokenizer, [ids])) == expected
    assert parsed(read(tokenizer, [[token] for token in ids])) == expected
    for at in range(1, len(ids)):
        assert parsed(read(tokenizer, [ids[:at], ids[at:]])) == expected


def test_arguments_may_have_the_marks_of_calls(model: Model, tokenizer: PromptTokenizer) -> None:
    """Marks in an argument are a part of it, as tokens too, whole and byte by byte."""
    text = model.written.replace("</tool_call>]", f"</tool_call>]{MARKS}")
    ids = tokenizer.decoder.encode(text, add_special_tokens=False).ids
    (name, arguments), *others = CALLS
    expected = ("", [(name, {**arguments, "b": arguments["b"] + MARKS}), *others])
    assert parsed(read(tokenizer, [ids])) == expected
    assert parsed(read(tokenizer, [[token] for token in ids])) == expected


@pytest.mark.no_cover
def test_a_call_that_is_cut_off_is_told_as_far_as_it_goes(
    model: Model, tokenizer: PromptTokenizer
) -> None:
    """Where max_tokens ends a call, its name and the beginning of its arguments are told."""
    ids = tokenizer.decoder.encode(model.written, add_special_tokens=False).ids
    whole = read(tokenizer, [ids])[1]
    begun = [read(tokenizer, [[i] for i in ids[:at]]) for at in range(0, len(ids) + 1, 2)]
    told = [(said, calls) for said, calls in begun if calls]
    # The text before them is a call whose name is not known yet.
    assert all(model.written.startswith(said) for said, calls in begun if not calls)
    for said, calls in told:
        assert said in model.written
        assert calls[:-1] == whole[: len(calls) - 1]
        assert calls[-1][0] == whole[len(calls) - 1][0]
        assert whole[len(calls) - 1][1].startswith(calls[-1][1])
    assert len({calls[0][1] for _, calls in told}) > 6


def _turns(
    model: Model, form: ToolFormat, text: Any, calls: list[Any], results: list[Any]
) -> list[Any]:
    """Messages for the template that call and answer."""
    if model.is_text:
        return [text, *results]
    said = {"role": "assistant", "content": ""}
    if form.results_in_call:
        told = [{"name": r["name"], "response": r["content"]} for r in results]
        return [{**said, "tool_calls": calls, "tool_responses": told}]
    if form.is_single:
        each = zip(calls, results, strict=True)
        return [m for call, result in each for m in ({**said, "tool_calls": [call]}, result)]
    return [{**said, "tool_calls": calls}, *results]


def test_the_prompt_is_that_of_the_template(model: Model, tokenizer: PromptTokenizer) -> None:
    """Tools, calls of an earlier answer and their results are written by the model's template."""
    messages: list[Any] = [{"role": "system", "content": "S"}, {"role": "user", "content": "?"}]
    given: list[ToolCall] = [
        {"id": str(i), "type": "function", "function": {"name": name, "arguments": GIVEN[i]}}
        for i, (name, _) in enumerate(CALLS)
    ]
    answer: ChatMessage = {"role": "assistant", "content": "", "tool_calls": given}
    results = [{"role": "tool", "content": str(i)} for i in range(len(CALLS))]
    (text,) = tokenizer.tool_format.as_text([answer])
    prompt = tokenizer.encode(tokenizer.chat_prompt([*messages, text, *results], TOOLS))
    functions = [{"name": name, "arguments": arguments} for name, arguments in CALLS]
    calls = [
        {"id": f"call0000{i}", "type": "function", "function": f} for i, f in enumerate(functions)
    ]
    results = [
        {**result, "tool_call_id": f"call0000{i}", "name": CALLS[i][0]}
        for i, result in enumerate(results)
    ]
    told = [*messages, *_turns(model, tool_format(model.template), text, calls, results)]
    if tokenizer.tool_format.tools_in_system:
        functions = [tool.definition()["function"] for tool in TOOLS]
        messages[0]["tools"] = json.dumps(functions)
    if model.instructs:
        told = tool_format(model.template).for_template(told, TOOLS)
    names = described(model.template, model.special, model.plain).special_tokens
    (rendered,), _ = render_jinja_template(
        [told],
        tools=[tool.definition() for tool in TOOLS],
        chat_template=model.template,
        add_generation_prompt=True,
        **names,
    )
    assert prompt == tokenizer.decoder.encode(rendered, add_special_tokens=False).ids


def test_marks_of_calls_are_no_text_of_other_answers(
    model: Model, tokenizer: PromptTokenizer
) -> None:
    """An answer to a request without tools has no special token as text."""
    ids = tokenizer.decoder.encode(model.written, add_special_tokens=False).ids
    text = AnswerText(tokenizer, cast("Place", None), (), with_logprobs=False, thinking=None).add(
        TokenEvent("1", ids)
    )
    assert not any(mark in text for mark in model.special)
