"""An ordinary program of pydantic-ai."""

import asyncio
from typing import Any

import ordinary
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

KINDS: list[Any] = [OpenAIChatModel, OpenAIResponsesModel]
SETTINGS = ModelSettings(temperature=0, max_tokens=120)


def agent(url: str = ordinary.URL, **given: Any) -> Agent[None, Any]:
    """An agent of the bundled model."""
    model = KINDS[0]("default", provider=OpenAIProvider(base_url=url, api_key=ordinary.KEY))
    return Agent(model, model_settings=SETTINGS, retries=0, **given)


def chat() -> None:
    """A question is answered, and a second one has the first turn before it."""
    first = agent().run_sync(ordinary.QUESTION[0]["content"])
    assert first.output == ordinary.ANSWER
    second = agent().run_sync("And of Italy?", message_history=first.all_messages())
    assert second.output


def stream() -> None:
    """A stream's text is the answer."""

    async def read() -> str:
        async with agent().run_stream(ordinary.QUESTION[0]["content"]) as result:
            return str(await result.get_output())

    assert asyncio.run(read()) == ordinary.ANSWER


def output_by_a_tool() -> None:
    """A model is filled by a call."""
    made = agent(output_type=ToolOutput(ordinary.Person)).run_sync(ordinary.PERSON)
    assert isinstance(made.output, ordinary.Person)


def output_by_a_schema() -> None:
    """A model is filled by the response format."""
    made = agent(output_type=NativeOutput(ordinary.Person)).run_sync(ordinary.PERSON)
    assert isinstance(made.output, ordinary.Person)


def abort() -> None:
    """A stream is left in its text."""

    async def read() -> None:
        async with agent().run_stream(ordinary.STORY) as result:
            async for _ in result.stream_text(debounce_by=None):
                await result.cancel()
                break

    asyncio.run(read())


def retry() -> None:
    """A request that finds no place is sent again."""
    answer = agent(ordinary.BUSY_URL).run_sync(ordinary.QUESTION[0]["content"])
    assert answer.output == ordinary.ANSWER


while KINDS:
    ordinary.run(chat, stream, output_by_a_tool, output_by_a_schema, abort, retry)
    KINDS.pop(0)
