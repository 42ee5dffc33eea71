"""OpenAI's own client on /v1/responses, against a running service with the bundled model."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from openai import OpenAI
from openai.types.responses import ResponseFunctionToolCall
from pydantic import SecretStr

from tests.contract.test_openai_clients import ANSWER, CITY, Role, connect
from tests.support.service import API_KEY, Service

pytestmark = pytest.mark.model

QUESTION = "What is the capital of France?"
FIELDS: dict[str, Any] = {"model": "default", "temperature": 0}


@pytest.fixture
def sdk(bundled_service: Service) -> Iterator[OpenAI]:
    """The official client against the bundled model."""
    with connect(bundled_service) as client:
        yield client


def test_create_and_continue(sdk: OpenAI) -> None:
    """A response is created, continued, retrieved and deleted."""
    first = sdk.responses.create(input=QUESTION, **FIELDS)
    assert (first.output_text, first.status) == (ANSWER, "completed")
    assert first.usage is not None
    assert first.usage.output_tokens_details.reasoning_tokens == 0
    second = sdk.responses.create(
        input="And of Italy?", previous_response_id=first.id, max_output_tokens=8, **FIELDS
    )
    assert second.output_text
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.total_tokens
    assert sdk.responses.retrieve(first.id) == first
    sdk.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as gone:
        sdk.responses.retrieve(first.id)
    assert gone.value.code == "response_not_found"


def test_stream(sdk: OpenAI) -> None:
    """A stream is read event by event, and by the client's helper."""
    events = list(sdk.responses.create(input=QUESTION, stream=True, **FIELDS))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == ANSWER
    assert events[-1].type == "response.completed"
    with sdk.responses.stream(input=QUESTION, **FIELDS) as stream:
        final = stream.get_final_response()
    assert final.output_text == ANSWER


def test_parse(sdk: OpenAI) -> None:
    """A Pydantic model as the text's format returns an instance of the model."""
    response = sdk.responses.parse(
        input="Describe Ada, an engineer.",
        text_format=Role,
        max_output_tokens=40,
        **FIELDS,
    )
    assert isinstance(response.output_parsed, Role)


def test_tools(sdk: OpenAI) -> None:
    """A function is called, whole and streamed, and its result is answered."""
    tool = {"type": "function", "name": "get_weather", "parameters": CITY, "strict": True}
    fields: dict[str, Any] = {**FIELDS, "tools": [tool], "max_output_tokens": 60}
    forced: Any = {"type": "function", "name": "get_weather"}
    said: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    (call,) = sdk.responses.create(input=said, tool_choice=forced, **fields).output
    assert isinstance(call, ResponseFunctionToolCall)
    assert json.loads(call.arguments).keys() == {"city"}
    with sdk.responses.stream(input=said, tool_choice=forced, **fields) as stream:
        (streamed,) = stream.get_final_response().output
    assert isinstance(streamed, ResponseFunctionToolCall)
    assert streamed.arguments == call.arguments
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}
    fields |= {"tool_choice": "none", "max_output_tokens": 8}
    said += [call, result]
    answer = sdk.responses.create(input=said, **fields)
    assert answer.output_text


def test_langchain(bundled_service: Service) -> None:
    """LangChain's chat model answers by this route, whole and streamed."""
    llm = ChatOpenAI(
        base_url=f"{bundled_service.base_url}/v1",
        api_key=SecretStr(API_KEY),
        use_responses_api=True,
        max_retries=0,
        **FIELDS,
    )
    assert llm.invoke(QUESTION).text == ANSWER
    assert "".join(piece.text for piece in llm.stream(QUESTION)) == ANSWER
