"""`null` in requests and answers: what docs/api.md says is what the service does."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from app.api import requests
from app.api.openai import messages, tools
from app.api.openai import schemas as openai
from app.api.openai.responses import items
from app.api.openai.responses import request as responses
from app.core.config import PROJECT_ROOT
from app.main import create_app
from tests.conftest import make_settings
from tests.contract.test_openapi import OPERATIONS, WITH_BODY, document, schema_of
from tests.support.openai import chat, chunks, complete, respond, response_events
from tests.support.service import API_KEY
from tests.support.sse import data_lines

API_DOC = (PROJECT_ROOT / "docs" / "api.md").read_text(encoding="utf-8")
STREAMED = {"choices.finish_reason", "usage"}
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "f"}}

MESSAGE = {"role": "user", "content": "hello"}
FUNCTION = {"name": "f", "arguments": "{}"}
# Each model of a request with its required fields alone.
REQUIRED: dict[type[requests.RequestModel], dict[str, Any]] = {
    requests.GenerateRequest: {"prompt": "hello"},
    requests.ChatRequest: {"messages": [MESSAGE]},
    requests.Message: MESSAGE,
    requests.ResponseFormat: {"type": "text"},
    requests.JsonSchemaFormat: {"schema": {}},
    openai.ChatCompletionRequest: {"model": "echo", "messages": [MESSAGE]},
    openai.CompletionRequest: {"model": "echo", "prompt": "hello"},
    openai.TokenizeRequest: {"text": "hello"},
    messages.OpenAIMessage: MESSAGE,
    messages.TextPart: {"type": "text", "text": "hello"},
    messages.ToolCallField: {"function": FUNCTION},
    messages.CalledFunctionField: FUNCTION,
    tools.ToolField: TOOL,
    tools.FunctionField: {"name": "f"},
    tools.NamedToolChoice: TOOL,
    tools.FunctionReference: {"name": "f"},
    tools.AllowedTools: {"mode": "auto", "tools": [TOOL]},
    tools.AllowedToolsChoice: {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [TOOL]},
    },
    openai.OpenAIResponseFormat: {"type": "text"},
    openai.OpenAIJsonSchema: {"schema": {}},
    openai.StreamOptions: {},
    responses.ResponsesRequest: {"model": "echo", "input": "hello"},
    responses.ResponsesTool: {"type": "function", "name": "f"},
    responses.FunctionChoice: {"type": "function", "name": "f"},
    responses.AllowedToolsChoice: {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "f"}],
    },
    responses.TextFormat: {"type": "text"},
    responses.TextField: {},
    responses.ReasoningField: {},
    items.InputItem: MESSAGE,
    items.InputText: {"type": "input_text", "text": "hello"},
}
# What others inherit from.
BASES = {
    requests.RequestModel,
    requests.Sampling,
    requests.SamplingFields,
    requests.ReasoningFields,
    messages.OpenAIModel,
    openai.OpenAISampling,
    openai.OpenAIFields,
    openai.PlatformHints,
}


def documented() -> set[str]:
    """The members that docs/api.md lists as those that may be null."""
    listed = API_DOC.partition("these are null:\n\n")[2].partition("\n\n")[0]
    return {
        name for line in re.findall(r"- (`.+?`):", listed) for name in re.findall("`(.+?)`", line)
    }


def may_be_null(schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """The members of an answer that its schema allows to be null."""
    if "$ref" in schema:
        schema = document()["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if schema.get("type") == "null":
        yield path
    for inner in [*schema.get("anyOf", ()), *filter(None, [schema.get("items")])]:
        yield from may_be_null(inner, path)
    for name, inner in schema.get("properties", {}).items():
        yield from may_be_null(inner, f"{path}.{name}".removeprefix("."))


def nulls(value: Any, path: str = "") -> Iterator[str]:
    """The members of an answer that are null."""
    if value is None:
        yield path
    elif isinstance(value, list):
        for inner in value:
            yield from nulls(inner, path)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from nulls(inner, f"{path}.{name}".removeprefix("."))


def request_models(base: type[requests.RequestModel]) -> Iterator[type[requests.RequestModel]]:
    """A model and all that inherit from it."""
    yield base
    for model in base.__subclasses__():
        yield from request_models(model)


# --- Requests -------------------------------------------------------------------------------------


def test_every_model_of_a_request_is_here() -> None:
    """The tests below look at every model that a request consists of."""
    assert set(request_models(requests.RequestModel)) == set(REQUIRED) | BASES


@pytest.mark.parametrize("model", REQUIRED, ids=lambda m: m.__name__)
def test_null_in_an_optional_field_is_not_sent(model: type[requests.RequestModel]) -> None:
    """A null in an optional field is as none; in a required one it is refused."""
    required = REQUIRED[model]
    plain = model.model_validate(required)
    for name, field in model.model_fields.items():
        sent = field.alias or name
        if sent not in required:
            assert model.model_validate({**required, sent: None}) == plain, sent
        elif field.is_required():
            with pytest.raises(ValidationError) as refused:
                model.model_validate({**required, sent: None})
            assert refused.value.errors()[0]["loc"] == (sent,)


@pytest.mark.parametrize("name", WITH_BODY)
def test_null_over_http(client: TestClient, name: str) -> None:
    """A route answers a null in any field of its schema as one that is not sent."""
    method, path = name.split()
    schema = schema_of(name)
    (example,) = schema["examples"]
    # Of /v1/tokenize's two fields one is needed, which its schema cannot say; the example has it.
    required = schema.get("required", example)

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        response = client.request(method, path, json=body)
        content = response.json()
        for varies in ("id", "created", "created_at", "completed_at", "cached"):
            content.pop(varies, None)
        for item in content.get("output", ()):
            del item["id"]
        return response.status_code, content if response.is_success else content["error"]["param"]

    for field in schema["properties"]:
        left_out = {name: value for name, value in example.items() if name != field}
        assert answer({**example, field: None}) == answer(left_out), field
        assert (answer(left_out)[0] == 200) == (field not in required), field


# --- Answers --------------------------------------------------------------------------------------


def test_the_schemas_allow_null_where_the_page_does() -> None:
    """The OpenAPI document allows null in exactly the members that docs/api.md lists."""
    allowed = {
        path
        for operation in OPERATIONS.values()
        for response in operation["responses"].values()
        for path in may_be_null(
            response.get("content", {}).get("application/json", {}).get("schema", {})
        )
    }
    assert allowed == documented() - STREAMED


def test_answers_are_null_where_the_page_says(client: TestClient) -> None:
    """Answers of all kinds have null in each member that docs/api.md lists, and in no other."""
    turn = {"session_id": "nulls", "messages": [MESSAGE]}
    stream = {"prompt": "hello", "stream": True}
    streamed = data_lines(client.post("/v1/generate", json=stream).text.splitlines())
    unstarted = TestClient(create_app(make_settings()), headers={"X-API-Key": API_KEY})
    answers = [
        *(unstarted.get(p).json() for p in ("/status", "/v1/models", "/v1/models/default")),
        *(client.get(p).json() for p in ("/status", "/health", "/livez", "/readyz", "/nothing")),
        client.post("/v1/generate", json={"prompt": ""}).json(),
        client.post("/v1/generate", json={"prompt": "hello"}).json(),
        client.post("/v1/chat", json=turn).json(),
        *map(json.loads, list(streamed)[:-1]),
        *(client.get(f"/v1/{path}").json() for path in ("sessions/nulls", "usage", "models")),
        client.post("/v1/tokenize", json={"text": "hello"}).json(),
        chat(client).json(),
        chat(client, CALL, tools=[TOOL]).json(),
        chat(client, logprobs=True).json(),
        *chunks(chat(client, stream=True, stream_options={"include_usage": True})),
        complete(client, logprobs=1).json(),
        *chunks(complete(client, stream=True)),
        respond(client, CALL, tools=[{"type": "function", "name": "f"}]).json(),
        *(e["response"] for e in response_events(respond(client, stream=True)) if "response" in e),
    ]
    assert {path for answer in answers for path in nulls(answer)} == documented()
