"""The clients of OpenAI and LangChain against a running service with the bundled model.

The tests check shapes, enforced schemas and a greedy answer that the model is known to give.
"""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import openai
import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field, SecretStr

from tests.support.live import LONG, background
from tests.support.service import API_KEY, Service, running_service

# The service is another process, so nothing of it is covered here.
pytestmark = [pytest.mark.model, pytest.mark.no_cover]

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}},
    "required": ["city"],
    "additionalProperties": False,
}
"""The parameters of a tool."""


class Person(BaseModel):
    """A person, as a schema for answers."""

    name: str = Field(max_length=20)
    role: Literal["engineer", "painter"]
    languages: list[Literal["de", "en", "fr"]] = Field(max_length=3)


class Role(BaseModel):
    """What a person is, as a schema whose answers are short."""

    role: Literal["engineer", "painter"]


def connect(service: Service, **options: Any) -> OpenAI:
    """A client of the service that uses no proxy and does not retry by itself."""
    settings = {"api_key": API_KEY, "max_retries": 0, **options}
    http = openai.DefaultHttpxClient(trust_env=False, timeout=120)
    return OpenAI(base_url=f"{service.base_url}/v1", http_client=http, **settings)


@pytest.fixture
def sdk(bundled_service: Service) -> Iterator[OpenAI]:
    """The official client against the bundled model."""
    with connect(bundled_service) as client:
        yield client


def test_chat(sdk: OpenAI) -> None:
    """A chat returns the answer, its finish reason and its usage."""
    completion = sdk.chat.completions.create(model="default", messages=QUESTION, temperature=0)
    assert completion.choices[0].message.content == ANSWER
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.total_tokens > completion.usage.completion_tokens > 0


def test_stream(sdk: OpenAI) -> None:
    """A stream is read chunk by chunk, and by the client's helper."""
    fields: dict[str, Any] = {"model": "default", "messages": QUESTION, "temperature": 0}
    options: Any = {"include_usage": True}
    with sdk.chat.completions.create(**fields, stream=True, stream_options=options) as stream:
        *chunks, last = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ANSWER
    assert last.usage is not None
    assert last.usage.completion_tokens > 3
    with sdk.chat.completions.stream(**fields) as events:
        final = events.get_final_completion()
    assert final.choices[0].message.content == ANSWER


def test_completions(sdk: OpenAI) -> None:
    """Completions of several prompts have several choices and log-probabilities."""
    completion = sdk.completions.create(
        model="default",
        prompt=["The capital of France is", "One, two, three,"],
        max_tokens=5,
        temperature=0,
        n=2,
        logprobs=0,
    )
    assert [c.index for c in completion.choices] == [0, 1, 2, 3]
    assert completion.choices[0].text.startswith(" Paris")
    assert completion.choices[2].text == completion.choices[3].text
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == completion.choices[0].text
    assert all(p <= 0 for p in logprobs.token_logprobs or [1.0])


def test_logprobs(sdk: OpenAI) -> None:
    """Each token of the text has a log-probability."""
    completion = sdk.chat.completions.create(
        model="default", messages=QUESTION, temperature=0, logprobs=True
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert b"".join(bytes(t.bytes or []) for t in logprobs.content).decode() == ANSWER
    assert all(t.logprob <= 0 for t in logprobs.content)


def test_models(sdk: OpenAI) -> None:
    """The model and its alias are listed and found."""
    names = [model.id for model in sdk.models.list()]
    assert names == ["SmolLM2-135M-Instruct", "default"]
    assert sdk.models.retrieve(names[0]).id == names[0]


async def test_async(bundled_service: Service) -> None:
    """The asynchronous client sends several requests at once, and leaves a stream early."""
    http = openai.DefaultAsyncHttpxClient(trust_env=False, timeout=120)
    async with AsyncOpenAI(
        base_url=f"{bundled_service.base_url}/v1", api_key=API_KEY, http_client=http
    ) as client:

        async def ask() -> str | None:
            completion = await client.chat.completions.create(
                model="default", messages=QUESTION, temperature=0, max_tokens=20
            )
            return completion.choices[0].message.content

        stream = await client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Tell me a very long story."}],
            stream=True,
        )
        await anext(aiter(stream))
        await stream.close()
        assert await asyncio.gather(*(ask() for _ in range(4))) == [ANSWER] * 4


def test_parse(sdk: OpenAI) -> None:
    """A Pydantic model as the response format returns an instance of the model."""
    completion = sdk.chat.completions.parse(
        model="default",
        messages=[{"role": "user", "content": "Describe Ada, an engineer who speaks English."}],
        response_format=Person,
        temperature=0,
        max_tokens=120,
    )
    person = completion.choices[0].message.parsed
    assert isinstance(person, Person)
    assert completion.choices[0].finish_reason == "stop"


def test_json_object(sdk: OpenAI) -> None:
    """The response format json_object returns a JSON object, or the beginning of one."""
    completion = sdk.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": 'Answer with {"city": NAME} for Paris.'}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=200,
    )
    if completion.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(completion.choices[0].message.content or ""), dict)
    else:
        assert (completion.choices[0].message.content or "").lstrip().startswith("{")


def test_tools(sdk: OpenAI) -> None:
    """A tool is called, whole and streamed, and its result is answered."""
    tools: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}]
    fields: dict[str, Any] = {
        "model": "default",
        "tools": tools,
        "temperature": 0,
        "max_tokens": 60,
    }
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    forced: Any = {"type": "function", "function": {"name": "get_weather"}}
    completion = sdk.chat.completions.create(messages=messages, tool_choice=forced, **fields)
    message = completion.choices[0].message
    assert completion.choices[0].finish_reason == "tool_calls"
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments).keys() == {"city"}
    with sdk.chat.completions.stream(messages=messages, tool_choice=forced, **fields) as events:
        streamed = events.get_final_completion().choices[0].message.tool_calls
    assert streamed is not None
    assert streamed[0].function.arguments == call.function.arguments
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "12 degrees, rain"}]
    fields |= {"tool_choice": "none", "max_tokens": 8}
    answer = sdk.chat.completions.create(messages=messages, **fields)
    assert answer.choices[0].message.content


@pytest.mark.parametrize(
    ("raised", "code", "ask"),
    [
        (
            openai.BadRequestError,
            "unsupported_parameter",
            lambda c, f: c(**f, modalities=["audio"]),
        ),
        (openai.BadRequestError, "validation_error", lambda c, f: c(**f, temperature=3)),
        (openai.NotFoundError, "model_not_found", lambda c, f: c(**{**f, "model": "gpt-4o"})),
    ],
    ids=["unsupported", "invalid", "model"],
)
def test_errors(
    sdk: OpenAI, raised: type[openai.APIStatusError], code: str, ask: Callable[..., Any]
) -> None:
    """An error raises the client's exception, with code, param and the request's id."""
    fields: dict[str, Any] = {"model": "default", "messages": QUESTION}
    with pytest.raises(raised) as caught:
        ask(sdk.chat.completions.create, fields)
    assert caught.value.code == code
    assert caught.value.param
    assert caught.value.request_id is not None


def test_a_bad_key(bundled_service: Service) -> None:
    """A wrong key is an AuthenticationError."""
    with connect(bundled_service, api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.chat.completions.create(model="default", messages=QUESTION)
        assert caught.value.code == "invalid_api_key"


def test_retries() -> None:
    """The client retries after 429 and after 503 as Retry-After says, and succeeds."""
    settings = {
        "RATE_LIMIT__ENABLED": "true",
        "RATE_LIMIT__REQUESTS_PER_MINUTE": "60",
        "RATE_LIMIT__BURST_SIZE": "3",
        "ENGINE__MAX_RUNNING": "1",
        "ENGINE__MAX_WAITING": "0",
        "ENGINE__ECHO_STEP_SECONDS": "0.005",
    }
    with running_service(**settings) as service, connect(service) as once:

        def ask(client: OpenAI, text: str) -> str | None:
            completion = client.chat.completions.create(
                model="echo", messages=[{"role": "user", "content": text}]
            )
            return completion.choices[0].message.content

        # The only place is taken for two seconds.
        with background(ask, once, LONG):
            _until_running(service)
            with pytest.raises(openai.InternalServerError) as busy:
                ask(once, "x")
            assert busy.value.code == "overloaded"
            assert int(busy.value.response.headers["Retry-After"]) >= 1
            with connect(service, max_retries=5) as patient:
                assert ask(patient, "after 503") == "after 503"
        with pytest.raises(openai.RateLimitError) as limited:  # noqa: PT012 - one of them
            for _ in range(10):
                ask(once, "y")
        assert limited.value.code == "rate_limit_exceeded"
        assert int(limited.value.response.headers["Retry-After"]) >= 1
        with connect(service, max_retries=5) as patient:
            assert ask(patient, "after 429") == "after 429"


def _until_running(service: Service) -> None:
    wait = threading.Event()
    for _ in range(200):
        if service.get("/status").json()["engine"]["queue"]["running"]:
            return
        wait.wait(0.01)
    pytest.fail("the first request never began")


@pytest.fixture
def llm(bundled_service: Service) -> ChatOpenAI:
    """LangChain's chat model for OpenAI."""
    return ChatOpenAI(
        model="default",
        base_url=f"{bundled_service.base_url}/v1",
        api_key=SecretStr(API_KEY),
        temperature=0,
        max_completion_tokens=120,
        max_retries=0,
        # A cached answer comes in one piece.
        extra_body={"cache": False},
    )


def test_langchain_invoke(llm: ChatOpenAI) -> None:
    """A message returns an answer with its usage."""
    answer = llm.invoke("What is the capital of France?")
    assert answer.text == ANSWER
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 3


async def test_langchain_astream(llm: ChatOpenAI) -> None:
    """The joined pieces of a stream are the answer."""
    pieces = [piece.text async for piece in llm.astream("What is the capital of France?")]
    assert "".join(pieces) == ANSWER
    assert len([p for p in pieces if p]) > 3


def test_langchain_structured_output(llm: ChatOpenAI) -> None:
    """with_structured_output returns an instance, by a schema and by a call."""
    for method in ("json_schema", "function_calling"):
        made = llm.with_structured_output(Role, method=method).invoke("Describe Ada, an engineer.")
        assert isinstance(made, Role), method


def test_langchain_tools(llm: ChatOpenAI) -> None:
    """bind_tools sends functions, and the answer has LangChain's tool calls."""

    @tool
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """Tell the weather of a city."""
        return f"Rain in {city}."

    answer = llm.bind_tools([get_weather], tool_choice="get_weather").invoke(
        "What is the weather in Paris?"
    )
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather"
    assert call["args"]["city"] in ("Paris", "Rome")
