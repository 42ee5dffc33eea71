"""Grammars for the transformers backend: which tokens may come next, by llguidance.

Translated are the grammars that :func:`app.llm.ebnf.grammars.to_ebnf` accepts, which the API
process has asked before; so both backends honour and refuse the same.
"""

import json
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import llguidance
import numpy as np
import torch
from torch import Tensor

from app.llm.ebnf import keywords, regex
from app.llm.ebnf.grammars import parse_schema
from app.llm.engine.base import Grammar, JsonSchemaGrammar, RegexGrammar, TagsGrammar

_JSON_OPTIONS: Final[Any] = {
    # One space at most, and only after a comma or a colon: a small model does not stop at one.
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    # Where oneOf is let through, no value can be of two of its schemas.
    "coerce_one_of": True,
    "lenient": False,
    "json_allowed_escapes": 'nrbtf\\"',
}


class GrammarError(RuntimeError):
    """The library refuses a grammar."""


class TokenMask:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    @property
    def error(self) -> str | None:
        """What went wrong, such as a limit of the library; only the end may come after it."""
        return _first_line(self._matcher.get_error()) if self._matcher.is_error() else None

    def apply(self, logits: Tensor) -> None:
        """Take every token's chance that may not come next.

        Args:
            logits: Of one row, [vocabulary]; changed in place.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        forbidden = np.unpackbits(bits, bitorder="little", count=logits.shape[-1]) == 0
        if logits.device.type == "cpu":
            # torch would wake all of its threads for this.
            np.putmask(logits.numpy(), forbidden, -np.inf)
        else:
            logits.masked_fill_(torch.from_numpy(forbidden).to(logits.device), -torch.inf)

    def accept(self, token_ids: Collection[int]) -> None:
        """Go on by tokens that were chosen."""
        # A grammar that allows nothing more has stopped by itself, before the token that ends it.
        if not self._matcher.is_stopped():
            self._matcher.consume_tokens(list(token_ids))


class GrammarCompiler:
    """Compiles grammars for one tokenizer."""

    def __init__(self, tokenizer_json: str, vocabulary_size: int, eos: Collection[int]) -> None:
        """Begin to read the tokenizer, which takes half a second and more, on a thread.

        Args:
            tokenizer_json: As the ``tokenizers`` library serialises it.
            vocabulary_size: Of the model.
            eos: Tokens that end an answer.
        """
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar-tokenizer")
        self._tokenizer: Future[llguidance.LLTokenizer] = thread.submit(
            llguidance.LLTokenizer, tokenizer_json, n_vocab=vocabulary_size, eos_token=sorted(eos)
        )
        thread.shutdown(wait=False)

    def compile(self, grammar: Grammar) -> TokenMask:
        """A mask for the first token of an answer.

        Raises:
            GrammarError: The library refuses it.
        """
        matcher = llguidance.LLMatcher(
            self._tokenizer.result(),
            translate(grammar),
            log_level=0,
            limits=llguidance.LLParserLimits(verbose_errors=False),
        )
        if matcher.is_error():
            raise GrammarError(_first_line(matcher.get_error()))
        return TokenMask(matcher)


def translate(grammar: Grammar) -> str:
    """A grammar in llguidance's own form.

    Raises:
        app.llm.ebnf.errors.GrammarError: It is malformed.
    """
    if isinstance(grammar, JsonSchemaGrammar):
        schema = _closed(parse_schema(grammar.schema))
        return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
    if isinstance(grammar, RegexGrammar):
        pattern = regex.canonical(regex.parse(grammar.pattern, whole=True))
        return llguidance.LLMatcher.grammar_from_regex(pattern)
    return llguidance.LLMatcher.grammar_from_lark(_lark(grammar))


def _first_line(error: str) -> str:
    """What the library says; the caller's grammar and the answer, which it adds, are private."""
    return error.partition("\n")[0][:200]


def _lark(grammar: TagsGrammar) -> str:
    # What comes before the value; where text may stand beside the tags, the trigger is read before.
    skip = 0 if grammar.required else len(grammar.trigger)
    tagged = " | ".join(f"tag_{i}" for i in range(len(grammar.tags)))
    if grammar.required:
        rules = [f"start: one{'' if grammar.single else ' (NEWLINE? one)*'}", f"one: {tagged}"]
    else:
        rules = [
            "start: one | TEXT" if grammar.single else "start: one* TEXT",
            f"one: trigger ({tagged})",
            f"trigger[lazy]: TEXT {json.dumps(grammar.trigger)}",
        ]
    for i, tag in enumerate(grammar.tags):
        schema = {"x-guidance": _JSON_OPTIONS, **_closed(parse_schema(tag.schema))}
        rules.append(
            f"tag_{i}: {_text(tag.begin[skip:])} %json {json.dumps(schema)} {_text(tag.end)}"
        )
    return "\n".join([*rules, r"NEWLINE: /\n/", r"TEXT: /(.|\n)*/", ""])


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _closed(schema: Any) -> dict[str, Any]:
    """A schema that allows no more than the openvino backend would write.

    An object has no property that is not listed, where some are, and patterns are spelled so that
    they mean the same to everyone.
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
    if isinstance(closed.get("pattern"), str):
        node = regex.parse(closed["pattern"], whole=False)
        closed["pattern"] = f"^{regex.canonical(node)}$"
    if not closed.keys() & {"type", *keywords.COMBINING} and (names := keywords.meant(closed)):
        closed["type"] = names
    return _listed_only(closed)


def _part(schema: Any) -> Any:
    return schema if isinstance(schema, bool) else _closed(schema)


def _listed_only(schema: dict[str, Any]) -> dict[str, Any]:
    others = schema.get("additionalProperties", True)
    unlisted = [n for n in schema.get("required", []) if n not in schema.get("properties", {})]
    properties = {**schema.get("properties", {}), **dict.fromkeys(unlisted, others)}
    if not properties:
        return schema
    return {**schema, "properties": properties, "additionalProperties": False}
