"""Translates the grammar of a request to EBNF."""

import json
import re
from typing import Any

from app.llm.ebnf import automaton, regex
from app.llm.ebnf.errors import GrammarError
from app.llm.ebnf.schema import SchemaCompiler
from app.llm.ebnf.spelled import compiler_of
from app.llm.ebnf.writer import EMPTY, Rules, alternatives, literal, optional, sequence
from app.llm.protocol import Grammar, JsonSchemaGrammar, RegexGrammar, TagsGrammar

# The library takes a second of two cores to compile this many any characters, while the engine
# does nothing else. Measured with 49,152, 151,936 and 200,000 tokens: the time grows with them.
_COUNTED_CHARACTERS = 120
_VOCABULARY = 50_000
# A string of any length takes 66, and has to be held with every vocabulary: in 1.4 s with
# 151,936 tokens.
_LONG_STRING = 75
# vLLM compiles in threads beside its steps, and one answer waits.
_COUNTED_IN_THREADS = 1_000
# Characters that the library prints in another form, and then reads wrong.
_LATIN = re.compile("[\x7f-\xff]")


def to_ebnf(grammar: Grammar, vocabulary_size: int | None) -> str:
    """Translate a grammar to xgrammar's dialect of EBNF; its first rule is ``root``.

    The more tokens the model has, the longer openvino's library takes to compile counted
    characters, and the fewer may be counted. ``None`` is for vLLM.

    Raises:
        GrammarError: The grammar cannot be compiled, or would not be enforced in full.
    """
    rules = rules_for(vocabulary_size)
    if isinstance(grammar, TagsGrammar):
        return _tags(grammar, rules)
    return rules.text(_whole(grammar, rules))


def rules_for(vocabulary_size: int | None) -> Rules:
    """No rules yet; see :func:`to_ebnf` for the size."""
    if vocabulary_size is None:
        return Rules(_COUNTED_IN_THREADS)
    return Rules(max(_COUNTED_CHARACTERS * _VOCABULARY / vocabulary_size, _LONG_STRING))


def _whole(grammar: JsonSchemaGrammar | RegexGrammar, rules: Rules) -> str:
    """An expression of the whole answer, but for what stands before it."""
    if isinstance(grammar, JsonSchemaGrammar):
        return SchemaCompiler(parse_schema(grammar.schema), rules).compile()
    return _regex(regex.parse(grammar.pattern, whole=True), rules)


def _regex(node: regex.Node, rules: Rules) -> str:
    if (texts := regex.texts(node)) is not None:
        return rules.texts(texts)
    states = automaton.of_expression(node)
    rules.pay(automaton.cost(states))
    return automaton.as_rules(states, rules, lookahead=automaton.NOTHING_FOLLOWS)


def parse_schema(text: str) -> Any:
    """Parse the text of a JSON schema; a :class:`GrammarError` says that it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError("it is not JSON") from error


def _tags(grammar: TagsGrammar, rules: Rules) -> str:
    shared = grammar.shared
    begins = [shared.opening] if shared else [t.begin for t in grammar.tags]
    if not grammar.tags or not all(begin.startswith(grammar.trigger) for begin in begins):
        raise GrammarError("each tag has to begin with the trigger")
    # If the answer may hold other text, the library has consumed the trigger by then.
    skip = 0 if grammar.required else len(grammar.trigger)
    parts = []
    for tag in grammar.tags:
        value = compiler_of(tag)(parse_schema(tag.schema), rules).compile()
        begin = tag.begin if shared else tag.begin[skip:]
        parts.append(sequence([literal(begin), value, literal(tag.end)]))
    tagged = rules.name(alternatives(parts))
    if shared:
        more = "" if grammar.single else f"({sequence([literal(shared.separator), tagged])})*"
        frame = [literal(shared.opening[skip:]), tagged, more or EMPTY, literal(shared.closing)]
        tagged = rules.name(sequence(frame))
    if not grammar.required:
        # The library wants one string here: literal() writes several where a character needs it.
        trigger = literal(grammar.trigger)
        if not grammar.trigger or '" "' in trigger or _LATIN.search(trigger):
            raise GrammarError("the trigger is empty or not plain text")
        loop = "false" if grammar.single or shared else "true"
        text = f"TagDispatch(({trigger}, {tagged}), loop_after_dispatch={loop})"
        if not grammar.text_begin:
            return rules.text(text)
        begin = literal(grammar.text_begin)
        return rules.text(f"({trigger} {tagged} | {begin} {rules.name(text)})")
    if not grammar.single and not shared:
        tagged = rules.name(f"{tagged} ({optional(literal(chr(10)))} {tagged})*")
    ways = [tagged]
    if grammar.otherwise is not None:
        begin = literal(grammar.text_begin)
        ways.append(sequence([begin, _whole(grammar.otherwise, rules)]))
    return rules.text(alternatives(ways))
