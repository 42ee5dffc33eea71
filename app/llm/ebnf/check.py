"""Checks a grammar in the API process, before the engine process gets it.

The compiler is imported with the first grammar, because most services get none.
"""

import asyncio
from collections.abc import Iterable
from functools import lru_cache

import msgspec

from app.llm.protocol import (
    EngineInfo,
    Grammar,
    JsonSchemaGrammar,
    RegexGrammar,
    TagsGrammar,
    TokenEvent,
)
from app.utils.errors import InternalError, InvalidGrammarError, ServiceError

# Limit for a grammar's schemas and texts together, whose check takes tens of milliseconds.
_MAX_CHARACTERS = 64 * 1024
# Programs send the same tools with each request. A grammar takes at most four times its limit.
_KEPT = 64

_unpack = msgspec.msgpack.Decoder(Grammar).decode


async def fit_grammar(grammar: Grammar, info: EngineInfo) -> tuple[Grammar, frozenset[str]]:
    """A grammar as it can be compiled, and the keywords of schemas that it does not hold.

    Every backend holds the same grammars; only the limit on counted characters depends on the
    backend. The translation runs in a thread, and its limits bound its time.

    Raises:
        InvalidGrammarError: A strict part of it cannot be held in full; the message says which.
    """
    if _size(grammar) > _MAX_CHARACTERS:
        raise _invalid(grammar, f"has more than {_MAX_CHARACTERS} characters")
    vocabulary_size = info.vocabulary_size if info.backend == "openvino" else None
    return await asyncio.to_thread(_fit, msgspec.msgpack.encode(grammar), vocabulary_size)


@lru_cache(maxsize=_KEPT)
def _fit(packed: bytes, vocabulary_size: int | None) -> tuple[Grammar, frozenset[str]]:
    from app.llm.ebnf.errors import GrammarError
    from app.llm.ebnf.fitting import fit

    grammar = _unpack(packed)
    try:
        return fit(grammar, vocabulary_size)
    except GrammarError as error:
        where = f"{error.where}: " if error.where else ""
        raise _invalid(grammar, f"cannot be used: {where}{error}") from error


async def broken_keywords(
    values: Iterable[tuple[str, str]], keywords: frozenset[str]
) -> tuple[str, ...]:
    """The keywords that values break, each of them beside its schema; all are JSON text.

    See :func:`app.llm.ebnf.validation.broken_keywords`. It runs in a thread.
    """

    def check() -> tuple[str, ...]:
        from app.llm.ebnf.validation import broken_keywords

        return broken_keywords(values, keywords)

    return await asyncio.to_thread(check)


def error_of(event: TokenEvent, grammar: Grammar | None) -> ServiceError:
    """The error of a request that failed in the engine, whose library may refuse its grammar."""
    if event.refused and grammar is not None:
        return _invalid(grammar, "is refused by the engine's library")
    return InternalError()


def grammar_param(grammar: Grammar) -> str:
    """Name of the request field that holds the grammar."""
    return "tools" if isinstance(grammar, TagsGrammar) else "response_format"


def _size(grammar: Grammar) -> int:
    if isinstance(grammar, JsonSchemaGrammar):
        return len(grammar.schema)
    if isinstance(grammar, RegexGrammar):
        return len(grammar.pattern)
    otherwise = _size(grammar.otherwise) if grammar.otherwise else 0
    return otherwise + sum(len(t.begin) + len(t.schema) + len(t.end) for t in grammar.tags)


def _invalid(grammar: Grammar, fault: str) -> InvalidGrammarError:
    kinds = {JsonSchemaGrammar: "JSON schema", RegexGrammar: "regular expression"}
    name = kinds.get(type(grammar), "tools' JSON schema")
    fault = fault.encode("ascii", "replace").decode()
    return InvalidGrammarError(f"The {name} {fault}.", param=grammar_param(grammar))
