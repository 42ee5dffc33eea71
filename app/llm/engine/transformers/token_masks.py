"""Grammars for the transformers backend: token masks by llguidance.

The API process has checked each grammar with :func:`app.llm.ebnf.grammars.to_ebnf`, so both
backends accept the same grammars.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import llguidance
import numpy as np
import torch
from torch import Tensor

from app.llm.ebnf import keywords, regex
from app.llm.ebnf.errors import GrammarError
from app.llm.ebnf.grammars import parse_schema
from app.llm.ebnf.schema import Path
from app.llm.ebnf.spelled import GemmaCompiler, MarkedCompiler, XmlCompiler
from app.llm.ebnf.strings import FORMATS
from app.llm.ebnf.writer import Rules, alternatives
from app.llm.notations import BEHIND_VALUE, GEMMA_QUOTE
from app.llm.protocol import Grammar, JsonSchemaGrammar, RegexGrammar, Tag, TagsGrammar

_JSON_OPTIONS: Final[Any] = {
    # At most one space, after a comma or a colon. A small model would go on with white space.
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    # to_ebnf accepts oneOf only if no value matches two of its schemas.
    "coerce_one_of": True,
    "lenient": False,
    "json_allowed_escapes": 'nrbtf\\"',
}


class TokenMask:
    """The grammar of one answer, with its state after the tokens so far."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    @property
    def error(self) -> str | None:
        """Why the grammar failed, such as a limit of the library; then the answer must end."""
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else None

    def apply(self, logits: Tensor) -> None:
        """Mask the tokens that the grammar forbids in one row of logits, [vocabulary]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        forbidden = np.unpackbits(bits, bitorder="little", count=logits.shape[-1]) == 0
        if logits.device.type == "cpu":
            # torch would wake all its threads for this.
            np.putmask(logits.numpy(), forbidden, -np.inf)
        else:
            logits.masked_fill_(torch.from_numpy(forbidden).to(logits.device), -torch.inf)

    def accept(self, token_ids: Collection[int]) -> None:
        """Advance the grammar by generated tokens."""
        # A complete grammar has stopped already when the end-of-sequence token comes.
        if not self._matcher.is_stopped():
            self._matcher.consume_tokens(list(token_ids))


class GrammarCompiler:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer_json: The tokenizer as the ``tokenizers`` library serialises it.
        eos: Tokens that end an answer.
    """

    def __init__(self, tokenizer_json: str, vocabulary_size: int, eos: Collection[int]) -> None:
        # Reading the tokenizer takes half a second or more.
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar-tokenizer")
        self._tokenizer: Future[llguidance.LLTokenizer] = thread.submit(
            llguidance.LLTokenizer, tokenizer_json, n_vocab=vocabulary_size, eos_token=sorted(eos)
        )
        thread.shutdown(wait=False)
        added = json.loads(tokenizer_json).get("added_tokens", [])
        self._added = {token["content"]: token["id"] for token in added}

    def compile(self, grammar: Grammar) -> TokenMask:
        """Compile a grammar to the mask of an answer's first token.

        Raises:
            GrammarError: The library rejects it.
        """
        matcher = llguidance.LLMatcher(
            self._tokenizer.result(),
            translate(grammar, self._added),
            log_level=0,
            limits=llguidance.LLParserLimits(verbose_errors=False),
        )
        if matcher.is_error():
            raise GrammarError(_first_line(matcher.get_error()))
        return TokenMask(matcher)


def translate(grammar: Grammar, added: Mapping[str, int]) -> str:
    """Translate a grammar to llguidance's format.

    ``added`` are the ids of added tokens by their texts. No text of a grammar matches those that
    are special, or that stand in angle brackets.

    Raises:
        GrammarError: It is malformed.
    """
    if isinstance(grammar, JsonSchemaGrammar):
        schema = _closed(parse_schema(grammar.schema))
        return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
    if isinstance(grammar, RegexGrammar):
        pattern = regex.canonical(regex.parse(grammar.pattern, whole=True))
        return llguidance.LLMatcher.grammar_from_regex(pattern)
    return llguidance.LLMatcher.grammar_from_lark(_lark(grammar, added))


def _first_line(error: str) -> str:
    """The library's message without the caller's grammar and answer, which are private."""
    return error.partition("\n")[0][:200]


def _lark(grammar: TagsGrammar, added: Mapping[str, int]) -> str:
    def text(written: str) -> str:
        return _text(written, added)

    inner = Rules(math.inf)

    # If text is allowed between the tags, the rule ``trigger`` has read the start of a tag already.
    skip = 0 if grammar.required else len(grammar.trigger)
    tagged = " | ".join(f"tag_{i}" for i in range(len(grammar.tags)))
    shared, single = grammar.shared, grammar.single
    if shared is not None:
        more = "" if single else f"({text(shared.separator)} ({tagged}))*"
        tagged = f"{text(shared.opening[skip:])} ({tagged}) {more} {text(shared.closing)}"
    if grammar.required:
        more = "" if single or shared else " (NEWLINE? one)*"
        rules = [f"start: one{more}", f"one: {tagged}"]
        if isinstance(grammar.otherwise, JsonSchemaGrammar):
            begin = text(grammar.text_begin)
            rules[0] += f" | {begin} %json {_json_schema(grammar.otherwise.schema)}"
        elif grammar.otherwise is not None:
            pattern = regex.canonical(regex.parse(grammar.otherwise.pattern, whole=True))
            rules[0] += f" | {text(grammar.text_begin)} /{pattern}/"
    else:
        mark = added.get(grammar.trigger)
        whole = "one | TEXT" if single or shared else "one* TEXT"
        if grammar.text_begin:
            whole = f"{text(grammar.text_begin)} ({whole}) | {text(grammar.trigger)} ({tagged})"
        rules = [
            f"start: {whole}",
            f"one: trigger ({tagged})" + ("" if mark is None else f" | TEXT <[{mark}]> ({tagged})"),
            f"trigger[lazy]: TEXT {json.dumps(grammar.trigger)}",
        ]
    for i, tag in enumerate(grammar.tags):
        begin = tag.begin if shared else tag.begin[skip:]
        rules.append(f"tag_{i}: {text(begin)} {_arguments(tag, inner, added)} {text(tag.end)}")
    if any(tag.notation != "json" for tag in grammar.tags):
        rules += [f"{name}: {body}" for name, body in inner.bodies.items()]
        rules += _marked_texts(added)
    return "\n".join([*rules, r"NEWLINE: /\n/", r"TEXT: /(.|\n)*/", ""])


def _json_schema(text: str) -> str:
    return json.dumps({"x-guidance": _JSON_OPTIONS, **_closed(parse_schema(text))})


class _Marked(MarkedCompiler):
    """Writes texts as the library's regular expressions, and numbers by its JSON."""

    def __init__(self, schema: Any, rules: Rules, added: Mapping[str, int]) -> None:
        super().__init__(schema, rules)
        self._added = added

    def _matching(self, node: regex.Node, mark: str) -> str:
        return self._then(f"({regex.canonical(node)})", mark)

    def _counted(self, mark: str, least: int, most: int | None) -> str:
        limit = "" if most is None else most
        return self._then(f"[^{_coded(mark[0])}]{{{least},{limit}}}", mark)

    def _then(self, pattern: str, mark: str) -> str:
        spelled = f"/{pattern}{_coded(mark)}/"
        token = self._added.get(mark)
        return spelled if token is None else f"({spelled} | /{pattern}/ <[{token}]>)"

    def _until(self, mark: str) -> str:
        return _UNTIL[mark]

    def _unlisted(self, least: int, most: int | None) -> str:
        return f"/[A-Za-z0-9_.-]{{{least},{'' if most is None else most}}}/"

    def _of_type(self, name: str, schema: keywords.Schema, path: Path) -> str:
        if name in {"integer", "number"}:
            return self._as_json({**schema, "type": name}, path)
        return super()._of_type(name, schema, path)

    def _as_json(self, schema: keywords.Schema, _: Path) -> str:
        text = json.dumps(schema)
        if '"$ref"' in text:
            # References lead from the root, which is not the library's.
            inner = {**_moved(schema), "$defs": {"root": _moved(self._root)}}
            text = json.dumps(inner)
        return f"%json {_json_schema(text)}"


class _Gemma(_Marked, GemmaCompiler):
    def _mark(self, text: str) -> str:
        return _text(text, self._added)

    def _listed(self, values: list[Any]) -> str:
        return alternatives(self._mark(self._spelled(value)) for value in values)


class _Xml(_Marked, XmlCompiler):
    pass


_UNTIL: Final = {GEMMA_QUOTE: "until_quote", BEHIND_VALUE: "until_value"}


def _arguments(tag: Tag, rules: Rules, added: Mapping[str, int]) -> str:
    if tag.notation == "json":
        return f"%json {_json_schema(tag.schema)}"
    kind = _Gemma if tag.notation == "gemma" else _Xml
    return kind(parse_schema(tag.schema), rules, added).compile()


def _marked_texts(added: Mapping[str, int]) -> list[str]:
    """Rules for the texts before a mark and the mark, which may be a token."""
    rules = [f"spelled_{name}[lazy]: TEXT {json.dumps(mark)}" for mark, name in _UNTIL.items()]
    for mark, name in _UNTIL.items():
        token = f" | TEXT <[{added[mark]}]>" if mark in added else ""
        rules.append(f"{name}: spelled_{name}{token}")
    return rules


def _moved(part: Any) -> Any:
    """A part of a schema whose root is a definition of another one."""
    if isinstance(part, list):
        return [_moved(item) for item in part]
    if not isinstance(part, dict):
        return part
    return {
        name: f"#/$defs/root{value[1:]}"
        if name == "$ref" and isinstance(value, str)
        else _moved(value)
        for name, value in part.items()
    }


def _coded(text: str) -> str:
    return "".join(f"\\x{ord(character):02x}" for character in text)


def _text(text: str, added: Mapping[str, int]) -> str:
    """A text, in which each added token may also be spelled by other tokens."""
    pattern = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
    parts = re.split(f"({pattern})", text) if pattern else [text]
    written = (
        f"({json.dumps(part)} | <[{added[part]}]>)"
        if part in added
        else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part
    )
    return " ".join(written)


def _closed(schema: Any) -> dict[str, Any]:
    """A schema that allows what the openvino backend's translation allows.

    An object with listed properties has no others.
    """
    if not isinstance(schema, Mapping):
        return {} if schema else {"enum": []}
    closed = dict(schema)
    for keyword in ("$defs", "definitions", "properties"):
        if isinstance(closed.get(keyword), dict):
            closed[keyword] = {name: _part(part) for name, part in closed[keyword].items()}
    for keyword in ("allOf", "anyOf", "oneOf", "prefixItems"):
        if isinstance(closed.get(keyword), list):
            closed[keyword] = [_part(part) for part in closed[keyword]]
    for keyword in ("items", "additionalProperties"):
        if keyword in closed:
            closed[keyword] = _part(closed[keyword])
    _rewrite_text(closed)
    if "propertyNames" in closed and not closed.get("properties"):
        pattern = _names_pattern(closed.pop("propertyNames"))
        closed["patternProperties"] = {pattern: closed.get("additionalProperties", True)}
        closed["additionalProperties"] = False
    if not closed.keys() & {"type", *keywords.COMBINING} and (names := keywords.meant(closed)):
        closed["type"] = names
    return _listed_only(closed)


def _rewrite_text(schema: dict[str, Any]) -> None:
    """Write a pattern or a format as a pattern that both libraries read alike."""
    name = schema.get("format")
    if isinstance(schema.get("pattern"), str):
        node = regex.parse(schema["pattern"], whole=False)
    elif isinstance(name, str) and name in FORMATS:
        # The library knows fewer formats, and reads some in another way.
        node = regex.parse(FORMATS[schema.pop("format")], whole=True)
    else:
        return
    schema["pattern"] = f"^{regex.canonical(node)}$"


def _names_pattern(schema: dict[str, Any]) -> str:
    """The pattern of the names of an object's members."""
    rule = {**schema}
    _rewrite_text(rule)
    least, most = rule.get("minLength", 0), rule.get("maxLength", "")
    return rule.get("pattern") or f"^(?s:.){{{least},{most}}}$"


def _part(schema: Any) -> Any:
    return schema if isinstance(schema, bool) else _closed(schema)


def _listed_only(schema: dict[str, Any]) -> dict[str, Any]:
    others = schema.get("additionalProperties", True)
    unlisted = [n for n in schema.get("required", []) if n not in schema.get("properties", {})]
    properties = {**schema.get("properties", {}), **dict.fromkeys(unlisted, others)}
    if not properties:
        return schema
    return {**schema, "properties": properties, "additionalProperties": False}
