"""Grammars for the vllm backend, in the terms of vLLM's structured output."""

from typing import Any

import msgspec
from vllm.sampling_params import StructuredOutputsParams

from app.llm.protocol import Grammar, JsonSchemaGrammar, RegexGrammar, TagsGrammar


def structured_outputs(grammar: Grammar) -> StructuredOutputsParams:
    """Translate a grammar; vLLM compiles it.

    Raises:
        ValueError: The schema of a tag is no JSON.
    """
    if isinstance(grammar, JsonSchemaGrammar):
        return StructuredOutputsParams(json=grammar.schema)
    if isinstance(grammar, RegexGrammar):
        return StructuredOutputsParams(regex=grammar.pattern)
    tag = {"type": "structural_tag", "format": _tags(grammar)}
    return StructuredOutputsParams(structural_tag=msgspec.json.encode(tag).decode())


def _tags(grammar: TagsGrammar) -> dict[str, Any]:
    """The format of a structural tag, as xgrammar documents it."""
    tags = [
        {
            "type": "tag",
            "begin": tag.begin,
            "content": {
                "type": "json_schema",
                "json_schema": msgspec.json.decode(tag.schema),
                "max_whitespace_cnt": 1,
            },
            "end": tag.end,
        }
        for tag in grammar.tags
    ]
    common = {"tags": tags, "at_least_one": grammar.required, "stop_after_first": grammar.single}
    if grammar.required:
        calls = {"type": "tags_with_separator", "separator": "\n", **common}
        other = grammar.otherwise
        if other is None:
            return calls
        form = (
            {"type": "regex", "pattern": other.pattern}
            if isinstance(other, RegexGrammar)
            else {"type": "json_schema", "json_schema": msgspec.json.decode(other.schema)}
        )
        return {"type": "or", "elements": [calls, form]}
    return {"type": "triggered_tags", "triggers": [grammar.trigger], **common}
