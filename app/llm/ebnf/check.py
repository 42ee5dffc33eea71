"""Checks a grammar in the API process, before the engine process gets it.

The compiler is imported with the first grammar, because most services get none.
"""

import asyncio
from typing import Final

from app.llm.protocol import (
    EngineInfo,
    Grammar,
    JsonSchemaGrammar,
    RegexGrammar,
    TagsGrammar,
)
from app.utils.errors import InvalidGrammarError

MAX_CHARACTERS: Final = 64 * 1024
"""Limit for a grammar's schemas and texts together, whose check takes tens of milliseconds."""


async def check_grammar(grammar: Grammar, info: EngineInfo) -> None:
    """Reject a grammar that cannot be compiled, or that would not be enforced in full.

    The grammar is translated as for the openvino backend, so that every backend rejects the same
    grammars; only the limit on counted characters depends on the backend. The translation runs in
    a thread, and its limits bound its time.

    Raises:
        InvalidGrammarError: It says why.
    """
    if _size(grammar) > MAX_CHARACTERS:
        raise InvalidGrammarError(
            f"The {_name(grammar)} has more than {MAX_CHARACTERS} characters.",
            param=grammar_param(grammar),
        )
    vocabulary_size = info.vocabulary_size if info.backend == "openvino" else None
    await asyncio.to_thread(_translate, grammar, vocabulary_size)


def _translate(grammar: Grammar, vocabulary_size: int | None) -> None:
    from app.llm.ebnf.errors import GrammarError
    from app.llm.ebnf.grammars import to_ebnf

    try:
        to_ebnf(grammar, vocabulary_size)
    except GrammarError as error:
        raise InvalidGrammarError(
            f"The {_name(grammar)} cannot be used: {error}.", param=grammar_param(grammar)
        ) from error


def grammar_param(grammar: Grammar) -> str:
    """Name of the request field that holds the grammar."""
    return "tools" if isinstance(grammar, TagsGrammar) else "response_format"


def _size(grammar: Grammar) -> int:
    if isinstance(grammar, JsonSchemaGrammar):
        return len(grammar.schema)
    if isinstance(grammar, RegexGrammar):
        return len(grammar.pattern)
    return sum(len(t.begin) + len(t.schema) + len(t.end) for t in grammar.tags)


def _name(grammar: Grammar) -> str:
    if isinstance(grammar, JsonSchemaGrammar):
        return "JSON schema"
    return "regular expression" if isinstance(grammar, RegexGrammar) else "tools' JSON schema"
