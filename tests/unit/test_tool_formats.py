"""Each model's own format of calls, from its template: the prompt, and calls read out of tokens."""

import json
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from transformers.utils.chat_template_utils import render_jinja_template

from app.llm.answer_text import AnswerText
from app.llm.client.place import Place
from app.llm.ebnf.grammars import to_ebnf
from app.llm.engine.transformers.token_masks import GrammarCompiler
from app.llm.protocol import Grammar, TokenEvent
from app.llm.tokenizer import PromptTokenizer
from app.llm.tool_calls import CallPiece, ToolCallParser
from app.llm.tools import ChatMessage, Tool, ToolCall, ToolFormat, ToolUse
from tests.data import chat_templates as templates
from tests.support.scripted import described

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("add", {"a": 1, "b": "x\n</tool_call>]"}),
    ("now", {}),
    ("add", {"a": 2}),
]
TOOLS = (
    Tool("add", "Adds.", {"type": "object", "properties": {"a": {"type": "integer"}}}),
    Tool("now", "Tells the time."),
)
GIVEN = [json.dumps(arguments) for _, arguments in CALLS]


@dataclass(frozen=True)
class Model:
    """A model's template and tokens, and the calls of :data:`CALLS` as it writes them.

    Attributes:
        is_text: Whether its template takes calls as text of the answer.
    """

    template: str
    special: tuple[str, ...]
    written: str
    plain: tuple[str, ...] = ()
    is_text: bool = False


def hermes(name: str, arguments: str) -> str:
    """A call as Hermes and Qwen write it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


_HERMES = "\n".join(hermes(name, GIVEN[i]) for i, (name, _) in enumerate(CALLS))
MODELS = {
    "hermes": Model(templates.HERMES, (), _HERMES, is_text=True),
    # The markers of Qwen 2.5 and 3 are tokens, which are not special.
    "qwen": Model(
        templates.QWEN_THINKING, (), _HERMES, plain=("<tool_call>", "</tool_call>"), is_text=True
    ),
    "llama 3": Model(
        templates.LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
        "; ".join(
            f'{{"name": "{name}", "parameters": {GIVEN[i]}}}' for i, (name, _) in enumerate(CALLS)
        ),
        is_text=True,
    ),
    "mistral": Model(
        templates.MISTRAL,
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        f'[TOOL_CALLS] [{{"name": "add", "arguments": {GIVEN[0]}}}, '
        f'{{"name": "now", "arguments": {{}}}}, {{"name": "add", "arguments": {GIVEN[2]}}}]',
    ),
    "mistral nemo": Model(
        templates.MISTRAL_NEMO,
        ("[INST]", "[/INST]", "[TOOL_CALLS]"),
        f'[TOOL_CALLS][{{"name": "add", "arguments": {GIVEN[0]}, "id": "abc"}},'
        f'{{"name": "now", "arguments": {{}}, "id": "}}"}}, '
        f'{{"name":"add","arguments":{GIVEN[2]}}}]',
    ),
    "granite 3": Model(
        templates.GRANITE3,
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"),
        f'<|tool_call|>[{{"name": "add", "arguments": {GIVEN[0]}}}, '
        f'{{"name": "now", "arguments": {{}}}}, {{"name": "add", "arguments": {GIVEN[2]}}}]',
        is_text=True,
    ),
    "phi 4 mini": Model(
        templates.PHI4_MINI,
        ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        f'<|tool_call|>[{{"name": "add", "arguments": {GIVEN[0]}}}, {{"name": "now", '
        f'"arguments": {{}}}}, {{"name": "add", "arguments": {GIVEN[2]}}}]<|/tool_call|>',
        plain=("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"),
        is_text=True,
    ),
    "mistral args": Model(
        templates.MISTRAL_ARGS,
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[AVAILABLE_TOOLS]"),
        f"[TOOL_CALLS]add[ARGS]{GIVEN[0]}[TOOL_CALLS]now[ARGS]{{}}[TOOL_CALLS]add[ARGS]{GIVEN[2]}",
    ),
}


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    """Each model."""
    return MODELS[request.param]


@pytest.fixture(scope="module")
def tokenizer(model: Model) -> PromptTokenizer:
    """Its tokenizer, which has a token for each byte."""
    return PromptTokenizer(described(model.template, model.special, model.plain))


def read(tokenizer: PromptTokenizer, pieces: list[list[int]]) -> tuple[str, list[tuple[str, Any]]]:
    """The text and the calls of an answer whose tokens come in these pieces."""
    place = cast("Place", None)
    text = AnswerText(tokenizer, place, (), with_logprobs=False, thinking=None, with_calls=True)
    parser = ToolCallParser(tokenizer.tool_format, {tool.name for tool in TOOLS})
    said, calls = "", list[list[str]]()
    found = [p for ids in pieces for p in parser.feed(text.add(TokenEvent("1", ids)))]
    for piece in (*found, *parser.flush()):
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                calls.append([piece.name, ""])
            calls[piece.index][1] += piece.arguments
        else:
            said += cast("str", piece)
    return said, [(name, json.loads(arguments)) for name, arguments in calls]


def test_calls_are_read_wherever_the_answer_is_cut(
    model: Model, tokenizer: PromptTokenizer
) -> None:
    """The calls that a model writes are found whole, byte by byte, and cut in two at each byte."""
    text = f"I look.\n{model.written}"
    ids = tokenizer.decoder.encode(text, add_special_tokens=False).ids
    expected = ("I look.", CALLS)
    assert read(tokenizer, [ids]) == expected
    assert read(tokenizer, [[token] for token in ids]) == expected
    for at in range(1, len(ids)):
        assert read(tokenizer, [ids[:at], ids[at:]]) == expected


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
    told = [
        *messages,
        text if model.is_text else {**answer, "tool_calls": calls},
        *(
            {**result, "tool_call_id": f"call0000{i}", "name": CALLS[i][0]}
            for i, result in enumerate(results)
        ),
    ]
    if tokenizer.tool_format.tools_in_system:
        functions = [tool.definition()["function"] for tool in TOOLS]
        messages[0]["tools"] = json.dumps(functions)
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


def allowed(compiler: GrammarCompiler, grammar: Grammar, ids: list[int]) -> bool:
    """Whether a grammar lets the model generate these tokens and end there."""
    mask = compiler.compile(grammar)
    for token in ids:
        logits = torch.zeros(max(ids) + 1)
        mask.apply(logits)
        if logits[token] < 0:
            return False
        mask.accept([token])
    return True


def written(form: ToolFormat, *names: str) -> str:
    """Calls of these functions, without arguments, as the model writes them."""
    calls: list[ToolCall] = [
        {"id": "", "type": "function", "function": {"name": name, "arguments": "{}"}}
        for name in names
    ]
    (message,) = form.as_text([{"role": "assistant", "content": "", "tool_calls": calls}])
    return message["content"]


def test_a_call_is_held_in_the_models_own_format(model: Model, tokenizer: PromptTokenizer) -> None:
    """Grammars allow calls as the model writes them, by its special tokens or by letters."""
    form, decoder = tokenizer.tool_format, tokenizer.decoder
    end = decoder.encode("<|im_end|>", add_special_tokens=False).ids[0]
    compiler = GrammarCompiler(decoder.to_str(), decoder.get_vocab_size(), [end])
    tools = (Tool("now"), Tool("later"))
    one, both, wrong = (written(form, *n.split()) for n in ("now", "now later", "now never"))
    auto, required, single = (ToolUse(tools, choice) for choice in ("auto", "required", "=now"))
    for text, use, is_allowed in (
        (one, required, True),
        (both, required, True),
        (wrong, required, False),
        ("now", required, False),
        (one, single, True),
        (both, single, False),
        (f"So: {one}", auto, True),
        (f"So: {both}", auto, True),
        (f"So: {wrong}", auto, False),
        ("now", auto, True),
    ):
        grammar = form.grammar(use)
        to_ebnf(grammar, 50_000)
        for parts in ([text], list(text)):
            ids = [i for p in parts for i in decoder.encode(p, add_special_tokens=False).ids]
            assert allowed(compiler, grammar, [*ids, end]) is is_allowed, (text, use.choice)
