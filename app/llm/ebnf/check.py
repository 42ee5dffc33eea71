"""Checks a grammar in the API process, before the engine process gets it.

The compiler is imported with the first grammar, because most services get none.
"""

import asyncio

from app.llm.protocol import EngineInfo, Grammar, JsonSchemaGrammar, RegexGrammar, TagsGrammar
from app.utils.errors import InvalidGrammarError

# Limit for a grammar's schemas and texts together, whose check takes tens of milliseconds.
_MAX_CHARACTERS = 64 * 1024


async def check_grammar(grammar: Grammar, info: EngineInfo) -> None:
    """Reject a grammar that cannot be compiled, or that would not be enforced in full.

    Every backend rejects the same grammars; only the limit on counted characters depends on the
    backend. The translation runs in a thread, and its limits bound its time.

    Raises:
        InvalidGrammarError: It says why.
    """
    if _size(grammar) > _MAX_CHARACTERS:
        raise _invalid(grammar, f"has more than {_MAX_CHARACTERS} characters")
    vocabulary_size = info.vocabulary_size if info.backend == "openvino" else None
    await asyncio.to_thread(_translate, grammar, vocabulary_size)


def _translate(grammar: Grammar, vocabulary_size: int | None) -> None:
    from app.llm.ebnf.errors import GrammarError
    from app.llm.ebnf.grammars import to_ebnf

    try:
        to_ebnf(grammar, vocabulary_size)
    except GrammarError as error:
        raise _invalid(grammar, f"cannot be used: {error}") from error


def grammar_param(grammar: Grammar) -> str:
    """Name of the request field that holds the grammar."""
    return "tools" if isinstance(grammar, TagsGrammar) else "response_format"


def _size(grammar: Grammar) -> int:
    if isinstance(grammar, JsonSchemaGrammar):
        return len(grammar.schema)
    if isinstance(grammar, RegexGrammar):
        return len(grammar.pattern)
    return sum(len(t.begin) + len(t.schema) + len(t.end) for t in grammar.tags)


def _invalid(grammar: Grammar, fault: str) -> InvalidGrammarError:
    kinds = {JsonSchemaGrammar: "JSON schema", RegexGrammar: "regular expression"}
    name = kinds.get(type(grammar), "tools' JSON schema")
    return InvalidGrammarError(f"The {name} {fault}.", param=grammar_param(grammar))
