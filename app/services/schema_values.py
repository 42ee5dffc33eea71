"""The values of a complete answer that have schemas."""

import json

from app.llm.protocol import JsonSchemaGrammar
from app.llm.tool_calls import read_calls
from app.llm.tools import CalledFunction, ToolFormat
from app.services.answers import Job


def schema_values(job: Job, text: str, form: ToolFormat) -> list[tuple[str, str]]:
    """The schemas that a job's answer has to follow, each with a value of it; all are JSON text.

    They are the arguments of its calls, or else its text. What is strict was held.
    """
    tools, calls = job.tools.tools if job.tools else (), list[CalledFunction]()
    if tools:
        text, calls = read_calls(text, form, {t.name: t.schema for t in tools})
    if not calls:
        grammar = job.grammar
        return [(grammar.schema, text)] if isinstance(grammar, JsonSchemaGrammar) else []
    schemas = {t.name: json.dumps(t.schema) for t in tools if not t.strict}
    return [(schemas[c["name"]], c["arguments"]) for c in calls if c["name"] in schemas]
