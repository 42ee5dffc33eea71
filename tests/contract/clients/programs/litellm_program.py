"""An ordinary program of LiteLLM."""

import asyncio
from typing import Any

import litellm
import ordinary

ASKED: Any = {
    "model": "openai/default",
    "api_base": ordinary.URL,
    "api_key": ordinary.KEY,
    "temperature": 0,
    "max_tokens": 120,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}


def chat() -> None:
    """A chat is answered; the fields that LiteLLM adds for its users are taken."""
    answer = litellm.completion(messages=ordinary.QUESTION, user="jane", **ASKED)
    assert answer.choices[0].message.content == ordinary.ANSWER
    assert answer.usage.total_tokens > 0


def stream() -> None:
    """A stream's pieces join to the answer."""
    pieces = litellm.completion(messages=ordinary.QUESTION, stream=True, **ASKED)
    said = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert said == ordinary.ANSWER


def tools() -> None:
    """A call, its result and the answer, with the message sent back as LiteLLM has it."""
    messages: list[Any] = [{"role": "user", "content": ordinary.WEATHER}]
    fields = {"tools": [TOOL], **ASKED}
    first = litellm.completion(messages=messages, tool_choice="required", **fields)
    message = first.choices[0].message
    messages.append(message)
    for call in message.tool_calls:
        result = {"role": "tool", "tool_call_id": call.id, "name": call.function.name}
        messages.append({**result, "content": "12 degrees, rain"})
    answer = litellm.completion(messages=messages, tool_choice="none", **fields)
    assert answer.choices[0].message.content


def structured() -> None:
    """A pydantic model as the response format gives JSON of it."""
    messages = [{"role": "user", "content": ordinary.PERSON}]
    answer = litellm.completion(messages=messages, response_format=ordinary.Person, **ASKED)
    ordinary.Person.model_validate_json(answer.choices[0].message.content)


def errors() -> None:
    """A refusal is LiteLLM's own exception."""
    try:
        litellm.completion(messages=ordinary.QUESTION, **{**ASKED, "model": "openai/gpt-9"})
    except litellm.NotFoundError:
        return
    raise AssertionError("another model was answered")


def abort() -> None:
    """A stream is left after its first piece."""

    async def leave() -> None:
        messages = [{"role": "user", "content": ordinary.STORY}]
        pieces = await litellm.acompletion(messages=messages, stream=True, **ASKED)
        await anext(pieces)
        await pieces.aclose()

    asyncio.run(leave())


def retry() -> None:
    """A request that finds no place is sent again."""
    asked = {**ASKED, "api_base": ordinary.BUSY_URL, "max_retries": 2}
    answer = litellm.completion(messages=ordinary.QUESTION, **asked)
    assert answer.choices[0].message.content == ordinary.ANSWER


ordinary.run(chat, stream, tools, structured, errors, abort, retry)
