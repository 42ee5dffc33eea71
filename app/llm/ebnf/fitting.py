"""Fits the schemas of a grammar to what a grammar holds.

A strict schema is held in full or refused. Another one is widened where it cannot be held: a part
of it to its type, then to any JSON.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

from msgspec.structs import replace

from app.llm.ebnf import keywords
from app.llm.ebnf.errors import GrammarError
from app.llm.ebnf.grammars import parse_schema, rules_for, to_ebnf
from app.llm.ebnf.rewriting import CONSTRAINING, Rewriter
from app.llm.ebnf.schema import SchemaCompiler
from app.llm.ebnf.spelled import compiler_of
from app.llm.protocol import Grammar, JsonSchemaGrammar, RegexGrammar, Tag

Part = JsonSchemaGrammar | Tag

_LIMITS: Final = ({"maxLength", "maxItems"}, {"minLength", "minItems"})
# What is widened for one limit may leave room for another; most schemas need one round.
_ROUNDS: Final = 4


def fit(grammar: Grammar, vocabulary_size: int | None) -> tuple[Grammar, frozenset[str]]:
    """A grammar that can be compiled, and the keywords that its answers need not follow.

    Raises:
        GrammarError: A strict part of it cannot be held, or the whole is too large.
    """
    parts = _parts(grammar)
    fitted, dropped = _Fitting(parts, vocabulary_size).run() if parts else ([], frozenset[str]())
    grammar = _with_parts(grammar, fitted)
    to_ebnf(grammar, vocabulary_size)
    return grammar, dropped


def _parts(grammar: Grammar) -> list[Part]:
    if isinstance(grammar, RegexGrammar):
        return []
    if isinstance(grammar, JsonSchemaGrammar):
        return [grammar]
    return [*grammar.tags, *(_parts(grammar.otherwise) if grammar.otherwise else ())]


def _with_parts(grammar: Grammar, parts: Sequence[Any]) -> Grammar:
    if isinstance(grammar, RegexGrammar):
        return grammar
    if isinstance(grammar, JsonSchemaGrammar):
        return parts[0]  # type: ignore[no-any-return]
    tags, rest = parts[: len(grammar.tags)], parts[len(grammar.tags) :]
    return replace(grammar, tags=list(tags), otherwise=rest[0] if rest else grammar.otherwise)


class _Fitting:
    """The schemas of one grammar on their way."""

    def __init__(self, parts: Sequence[Part], vocabulary_size: int | None) -> None:
        self._parts = parts
        self._vocabulary_size = vocabulary_size
        self._dropped: set[str] = set()
        self._schemas: list[Any] = []

    def run(self) -> tuple[list[Part], frozenset[str]]:
        """The parts with schemas that can be compiled, and the keywords that were dropped."""
        for part in self._parts:
            schema = parse_schema(part.schema)
            rewriter = Rewriter(schema, strict=part.strict)
            try:
                self._schemas.append(rewriter.rewrite(schema))
            except RecursionError:
                raise GrammarError("it nests too deeply") from None
            self._dropped |= rewriter.dropped
        for _ in range(_ROUNDS):
            if self._fits() or not self._widen():
                break
        else:
            self._schemas = [
                schema if part.strict else self._opened(schema)
                for part, schema in zip(self._parts, self._schemas, strict=True)
            ]
        fitted = [
            replace(part, schema=json.dumps(schema), strict=True)
            for part, schema in zip(self._parts, self._schemas, strict=True)
        ]
        return fitted, CONSTRAINING & self._dropped

    def _fits(self) -> bool:
        """Whether everything can be compiled as it is."""
        rules = rules_for(self._vocabulary_size)
        try:
            for part, schema in zip(self._parts, self._schemas, strict=True):
                compiler_of(part)(schema, rules).compile()
        except GrammarError:
            return False
        return True

    def _widen(self) -> bool:
        """Widen what cannot be compiled; returns whether there was anything."""
        rules = rules_for(self._vocabulary_size)
        if not all(part.strict for part in self._parts):
            # Any JSON takes the place of what fails, so there has to be room for it.
            SchemaCompiler(True, rules).compile()
        failed_any = False
        for i, part in enumerate(self._parts):
            failed: list[Any] = []
            kind, kept = compiler_of(part), None if part.strict else failed
            compiler = kind(self._schemas[i], rules, kept)
            try:
                compiler.compile()
            except GrammarError as error:
                if part.strict:
                    error.where = _place(self._schemas[i], error.part, part.where)
                    raise
                failed = [self._schemas[i]]
            if failed:
                failed_any = True
                self._schemas[i] = self._without(self._schemas[i], {id(f) for f in failed})
        return failed_any

    def _without(self, schema: Any, failed: set[int]) -> Any:
        """A schema whose failed parts are widened."""
        if isinstance(schema, list):
            return [self._without(part, failed) for part in schema]
        if not isinstance(schema, dict):
            return True if schema is False else schema
        if id(schema) in failed:
            return self._opened(schema)
        return {name: self._without(part, failed) for name, part in schema.items()}

    def _opened(self, schema: Any) -> Any:
        """A schema without what is likeliest at fault, or its type alone, or any JSON."""
        if not isinstance(schema, dict):
            return True
        if "oneOf" in schema and "anyOf" not in schema:
            self._dropped.add("oneOf")
            return {"anyOf" if k == "oneOf" else k: v for k, v in schema.items()}
        for limits in _LIMITS:
            if found := schema.keys() & limits:
                self._dropped |= found
                return {k: v for k, v in schema.items() if k not in limits}
        told = schema.keys() - keywords.ANNOTATIONS
        self._dropped |= told - {"type"}
        kept = {k: v for k, v in schema.items() if k in ("$defs", "definitions")}
        kind = schema.get("type") or (["object"] if "properties" in schema else None)
        return {**kept, "type": kind} if kind and told != {"type"} else (kept or True)


def _place(schema: Any, part: Any, where: str) -> str:
    """Where in a schema a part of it stands, by the names that lead to it."""
    if schema is not part and isinstance(schema, dict | list):
        inner = schema.items() if isinstance(schema, dict) else enumerate(schema)
        for name, value in inner:
            if found := _place(value, part, f"{where}.{str(name)[:64]}"):
                return found
    return where if schema is part else ""
