"""An ordinary program of instructor."""

from typing import Any

import instructor
import openai
import ordinary

CLIENT = openai.OpenAI(base_url=ordinary.URL, api_key=ordinary.KEY)
ASKED: Any = {
    "model": "default",
    "messages": [{"role": "user", "content": ordinary.PERSON}],
    "response_model": ordinary.Person,
    "temperature": 0,
    "max_tokens": 120,
}


def extract(mode: instructor.Mode) -> None:
    """A pydantic model is filled."""
    person = instructor.from_openai(CLIENT, mode=mode).chat.completions.create(**ASKED)
    assert isinstance(person, ordinary.Person)


def tools() -> None:
    """By a call of a tool."""
    extract(instructor.Mode.TOOLS)


def json_schema() -> None:
    """By a schema as the response format."""
    extract(instructor.Mode.JSON_SCHEMA)


def partial() -> None:
    """As a stream of models that fill."""
    client = instructor.from_openai(CLIENT, mode=instructor.Mode.TOOLS)
    models = list(client.chat.completions.create_partial(**ASKED))
    assert models[-1].role in ("engineer", "painter")


def abort() -> None:
    """A stream of the client that instructor wraps is left after its first piece."""
    asked = {**ASKED, "response_model": None, "stream": True}
    with instructor.from_openai(CLIENT).chat.completions.create(**asked) as pieces:
        next(iter(pieces))


def retry() -> None:
    """A request that finds no place is sent again."""
    client = openai.OpenAI(base_url=ordinary.BUSY_URL, api_key=ordinary.KEY)
    assert instructor.from_openai(client).chat.completions.create(**ASKED)


ordinary.run(tools, json_schema, partial, abort, retry)
