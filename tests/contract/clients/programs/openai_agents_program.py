"""An ordinary program of the OpenAI Agents SDK, on its default model and on chat completions."""

import asyncio
from typing import Any

import agents
import openai
import ordinary

agents.set_tracing_disabled(True)


@agents.function_tool
def get_weather(city: str) -> str:
    """Tell the weather of a city.

    Args:
        city: Its name.
    """
    return f"Rain in {city}."


make_model: Any = agents.OpenAIResponsesModel


def agent(url: str = ordinary.URL, **given: Any) -> agents.Agent[None]:
    """An agent of the bundled model."""
    # A client belongs to one event loop, and each part has its own.
    client = openai.AsyncOpenAI(base_url=url, api_key=ordinary.KEY)
    model = make_model(model="default", openai_client=client)
    settings = {"temperature": 0, "max_tokens": 120, **given.pop("settings", {})}
    model_settings = agents.ModelSettings(**settings)
    return agents.Agent(name="Guide", model=model, model_settings=model_settings, **given)


def chat() -> None:
    """A question is answered."""
    result = asyncio.run(agents.Runner.run(agent(), ordinary.QUESTION[0]["content"]))
    assert result.final_output == ordinary.ANSWER


def stream() -> None:
    """A run is streamed to its end."""

    async def read() -> Any:
        result = agents.Runner.run_streamed(agent(), ordinary.QUESTION[0]["content"])
        async for _ in result.stream_events():
            pass
        return result.final_output

    assert asyncio.run(read()) == ordinary.ANSWER


def tools() -> None:
    """A function is called, and its result goes back to the model."""
    guide = agent(tools=[get_weather], settings={"tool_choice": "required"})
    result = asyncio.run(agents.Runner.run(guide, ordinary.WEATHER))
    kinds = [item.type for item in result.new_items]
    assert "tool_call_output_item" in kinds, kinds
    assert result.final_output


def structured() -> None:
    """A pydantic model is the output."""
    guide = agent(output_type=ordinary.Person)
    result = asyncio.run(agents.Runner.run(guide, ordinary.PERSON))
    assert isinstance(result.final_output, ordinary.Person)


def continued() -> None:
    """A second run continues the first one's last response."""

    async def talk() -> Any:
        first = await agents.Runner.run(agent(), "My name is Ada.")
        return await agents.Runner.run(
            agent(), "What is my name?", previous_response_id=first.last_response_id
        )

    assert asyncio.run(talk()).final_output


def history() -> None:
    """A second run is given all items of the first one."""

    async def talk() -> Any:
        first = await agents.Runner.run(agent(), "My name is Ada.")
        question: Any = {"role": "user", "content": "What is my name?"}
        return await agents.Runner.run(agent(), [*first.to_input_list(), question])

    assert asyncio.run(talk()).final_output


def abort() -> None:
    """A run is left in its stream."""

    async def leave() -> None:
        result = agents.Runner.run_streamed(agent(), ordinary.STORY)
        async for event in result.stream_events():
            if event.type == "raw_response_event" and "delta" in event.data.type:
                result.cancel()

    asyncio.run(leave())


def retry() -> None:
    """A request that finds no place is sent again."""
    question = ordinary.QUESTION[0]["content"]
    result = asyncio.run(agents.Runner.run(agent(ordinary.BUSY_URL), question))
    assert result.final_output == ordinary.ANSWER


ordinary.run(chat, stream, tools, structured, continued, history, abort, retry)
make_model = agents.OpenAIChatCompletionsModel
ordinary.run(chat, stream, tools, structured, abort, retry)
