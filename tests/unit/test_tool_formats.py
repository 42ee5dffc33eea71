"""Each model's own format of calls, from its template: the prompt, and calls read out of tokens."""

import json
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from transformers.utils.chat_template_utils import render_jinja_template

from app.llm.answer_text import AnswerText
from app.llm.client.place import Place
from app.llm.ebnf.fitting import fit
from app.llm.ebnf.grammars import to_ebnf
from app.llm.engine.transformers.token_masks import GrammarCompiler
from app.llm.protocol import Grammar, TokenEvent
from app.llm.tokenizer import PromptTokenizer
from app.llm.tool_calls import CallPiece, ToolCallParser, read_calls
from app.llm.tool_formats import tool_format
from app.llm.tools import ChatMessage, Tool, ToolCall, ToolFormat, ToolUse
from tests.data import call_templates
from tests.data import chat_templates as templates
from tests.support.ebnf_reader import matches
from tests.support.scripted import described

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("add", {"a": 1, "b": "x\n</tool_call>]"}),
    ("now", {}),
    ("add", {"a": 2}),
]
TOOLS = (
    Tool(
        "add",
        "Adds.",
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    ),
    Tool("now", "Tells the time."),
)
GIVEN = [json.dumps(arguments) for _, arguments in CALLS]
# Marks of all models, which a call's arguments may have.
MARKS = (
    "<tool_call><|tool_call>call:now{}<tool_call|></function> <parameter=c> [TOOL_CALLS]now[ARGS]"
    "<|tool_call|>[<|/tool_call|><|channel|>final<|message|>" + "".join(call_templates.CALL_TOKENS)
)


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

    @property
    def instructs(self) -> bool:
        """Whether the model is told of tools in the system message."""
        return not tool_format(self.template).in_template


def hermes(name: str, arguments: str) -> str:
    """A call as Hermes and Qwen write it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def qwen35(name: str, **arguments: str) -> str:
    """A call as Qwen 3.5 writes it."""
    given = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{given}</function>\n</tool_call>"


def deepseek(before: str, behind: str, end: str, separator: str) -> str:
    """The calls as DeepSeek writes them."""
    first, last, begin, ended, sep = call_templates.CALL_TOKENS
    each = (
        f"{begin}{before.format(sep=sep, name=name)}{behind}{GIVEN[i]}{end}{ended}"
        for i, (name, _) in enumerate(CALLS)
    )
    return f"{first}{separator.join(each)}{last}"


def harmony(name: str, arguments: str) -> str:
    """A call as gpt-oss writes it."""
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}"


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
    "qwen 3.5": Model(
        call_templates.QWEN35,
        (),
        "\n".join(
            [qwen35("add", a="1", b="x\n</tool_call>]"), qwen35("now"), qwen35("add", a="2")]
        ),
        plain=("<tool_call>", "</tool_call>", "<think>", "</think>"),
        is_text=True,
    ),
    "deepseek v3.1": Model(
        call_templates.DEEPSEEK31,
        (),
        deepseek("{name}{sep}", "", "", ""),
        plain=(*call_templates.CALL_TOKENS, call_templates.USER, call_templates.ASSISTANT),
        is_text=True,
    ),
    "deepseek r1": Model(
        call_templates.DEEPSEEK_R1,
        (call_templates.USER, call_templates.ASSISTANT, *call_templates.CALL_TOKENS),
        deepseek("function{sep}{name}", "\n```json\n", "\n```", "\n"),
        is_text=True,
    ),
    "gemma 3": Model(
        templates.GEMMA3,
        ("<start_of_turn>", "<end_of_turn>"),
        "\n".join(
            f'```json\n{{"name": "{name}", "parameters": {GIVEN[i]}}}\n```'
            for i, (name, _) in enumerate(CALLS)
        ),
        is_text=True,
    ),
    "gemma 4": Model(
        call_templates.GEMMA4,
        ("<|tool_call>", "<tool_call|>", '<|"|>', "<|turn>", "<turn|>", "<|channel>", "<channel|>"),
        '<|tool_call>call:add{a:1,b:<|"|>x\n</tool_call>]<|"|>}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|><|tool_call>call:add{a:2}<tool_call|>",
    ),
    "gpt-oss": Model(
        call_templates.GPT_OSS,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>"),
        "".join(harmony(name, GIVEN[i]) for i, (name, _) in enumerate(CALLS)),
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


def test_a_call_that_is_cut_off_is_told_as_far_as_it_goes(
    model: Model, tokenizer: PromptTokenizer
) -> None:
    """Where max_tokens ends a call, its name and the beginning of its arguments are told."""
    ids = tokenizer.decoder.encode(model.written, add_special_tokens=False).ids
    whole = read(tokenizer, [ids])[1]
    begun = [read(tokenizer, [[i] for i in ids[:at]]) for at in range(len(ids) + 1)]
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
    prompt = tokenizer.encode_chat([*messages, text, *results], TOOLS)
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
    several = not form.is_single
    # A call has a header in place of the text's.
    so = form.text_header or "So: "
    for text, use, is_allowed in (
        (one, required, True),
        (both, required, several),
        (wrong, required, False),
        ("now", required, False),
        (one, single, True),
        (both, single, False),
        (one, auto, True),
        *([(so + one, auto, True), (so + both, auto, True)] if several else []),
        (so + wrong, auto, False),
        (f"{so}now", auto, True),
        ("now", auto, not form.text_header),
    ):
        grammar = form.grammar(use)
        to_ebnf(grammar, 50_000)
        for parts in ([text], list(text)):
            ids = [i for p in parts for i in decoder.encode(p, add_special_tokens=False).ids]
            assert allowed(compiler, grammar, [*ids, end]) is is_allowed, (text, use.choice)


SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "kind": {"enum": ["a b", "c", 3]},
        "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]+$"},
        "short": {"type": "string", "minLength": 1, "maxLength": 3},
        "count": {"type": "integer", "minimum": 5},
        "maybe": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "tree": {"$ref": "#/$defs/tree"},
        "names": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
    },
    "required": ["text"],
    "additionalProperties": False,
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {"n": {"type": "number"}, "in": {"$ref": "#/$defs/tree"}},
            "required": ["n"],
            "additionalProperties": False,
        }
    },
}
HELD: list[dict[str, Any]] = [
    {"text": ""},
    {"text": 'two\nlines, <b>"quoted"</b> {1: [2]} \\ </parameter> <|x é'},
    {"text": "x", "kind": "a b", "code": "AB12", "short": "abc", "count": 5},
    {"text": "x", "kind": 3, "maybe": None, "tree": {"n": 1.5, "in": {"n": -2}}, "names": []},
    {"text": "x", "maybe": True, "names": ["a, b", "]"]},
]
NOT_HELD: list[dict[str, Any]] = [
    {},
    {"other": 1, "text": "x"},
    {"text": 1, "kind": "d"},
    {"text": "x", "code": "ab12"},
    {"text": "x", "short": "abcd"},
    {"text": "x", "short": ""},
    {"text": "x", "count": 4},
    {"text": "x", "maybe": "perhaps"},
    {"text": "x", "tree": {}},
    {"text": "x", "names": ["a", "b", "c"]},
]


@pytest.mark.parametrize("name", ["hermes", "qwen 3.5", "gemma 4"])
def test_a_schema_is_held_in_every_notation(name: str) -> None:
    """Grammars of both kinds of library allow arguments of the schema, and no others."""
    model = MODELS[name]
    tokenizer = PromptTokenizer(described(model.template, model.special, model.plain))
    form, decoder = tokenizer.tool_format, tokenizer.decoder
    end = decoder.encode("<|im_end|>", add_special_tokens=False).ids[0]
    compiler = GrammarCompiler(decoder.to_str(), decoder.get_vocab_size(), [end])
    use = ToolUse((Tool("f", None, SCHEMA, strict=True),), "required", parallel=False)
    grammar, dropped = fit(form.grammar(use), None)
    assert not dropped
    rules = to_ebnf(grammar, None)
    for arguments, is_held in [*((a, True) for a in HELD), *((a, False) for a in NOT_HELD)]:
        text = form.written([{"name": "f", "arguments": json.dumps(arguments, ensure_ascii=False)}])
        assert matches(rules, text) is is_held, arguments
        ids = [[*decoder.encode(text, add_special_tokens=False).ids, end]]
        ids.append([i for c in text for i in decoder.encode(c, add_special_tokens=False).ids])
        assert all(allowed(compiler, grammar, each) is is_held for each in ids), arguments
        if is_held:
            (call,) = read_calls(text, form, {"f": SCHEMA})[1]
            assert json.loads(call["arguments"]) == arguments
