"""The values of a complete answer that have schemas."""

import json

from app.llm.generator import TextGenerator
from app.llm.protocol import JsonSchemaGrammar
from app.llm.tool_calls import read_calls
from app.llm.tools import CalledFunction
from app.services.answers import Job


def schema_values(job: Job, text: str, generator: TextGenerator) -> list[tuple[str, str]]:
    """The schemas that a job's answer has to follow, each with a value of it; all are JSON text.

    They are the arguments of its calls, or else its text. What is strict was held.
    """
    tools, calls = job.tools.tools if job.tools else (), list[CalledFunction]()
    if tools:
        text, calls = read_calls(text, generator.tool_format, {t.name: t.schema for t in tools})
    if not calls:
        form = job.grammar
        return [(form.schema, text)] if isinstance(form, JsonSchemaGrammar) else []
    schemas = {t.name: json.dumps(t.schema) for t in tools if not t.strict}
    return [(schemas[c["name"]], c["arguments"]) for c in calls if c["name"] in schemas]
