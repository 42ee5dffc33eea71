"""Grammars that hold calls in each model's own format, for both kinds of library."""

import json
from typing import Any

import pytest
import torch

from app.llm.ebnf.fitting import fit
from app.llm.ebnf.grammars import to_ebnf
from app.llm.engine.transformers.token_masks import GrammarCompiler
from app.llm.protocol import Grammar
from app.llm.tokenizer import PromptTokenizer
from app.llm.tool_calls import read_calls
from app.llm.tools import Tool, ToolCall, ToolFormat, ToolUse
from tests.support.calling_models import MODELS, Model
from tests.support.ebnf_reader import matches
from tests.support.scripted import described


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    """Each model."""
    return MODELS[request.param]


@pytest.fixture(scope="module")
def tokenizer(model: Model) -> PromptTokenizer:
    """Its tokenizer, which has a token for each byte."""
    return PromptTokenizer(described(model.template, model.special, model.plain))


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
