"""The response of POST /v1/responses, by OpenAI's API reference."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from app.api.openai.answers import ChatToken

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(BaseModel):
    """A part of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] = Field(description="Empty.")
    logprobs: list[ChatToken] = Field(description="Empty where they were not asked for.")


class OutputMessage(BaseModel):
    """What the model said."""

    id: str
    type: Literal["message"]
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(BaseModel):
    """A call of a function."""

    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str = Field(description="JSON text.")


class ReasoningText(BaseModel):
    """A part of the reasoning."""

    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(BaseModel):
    """What the model thought before."""

    id: str
    type: Literal["reasoning"]
    status: Status
    summary: list[Any] = Field(description="Empty.")
    content: list[ReasoningText]


class InputTokensDetails(BaseModel):
    """Where the input's tokens came from."""

    cached_tokens: int = Field(description="Tokens found in the engine's KV cache.")


class OutputTokensDetails(BaseModel):
    """What the output's tokens are."""

    reasoning_tokens: int


class ResponsesUsage(BaseModel):
    """Tokens of one response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    dropped_messages: int = Field(
        0, description="Messages of the history that did not fit; left out where none."
    )


class IncompleteDetails(BaseModel):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens", "content_filter"]


class Conversation(BaseModel):
    """The conversation that the response belongs to."""

    id: str


class ResponseObject(BaseModel):
    """Answer of POST /v1/responses and of GET /v1/responses/{response_id}."""

    id: str
    object: Literal["response"]
    created_at: int = Field(description="Unix time.")
    completed_at: int = Field(0, description="Unix time; left out until then.")
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    error: None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputReasoning | OutputMessage | OutputCall]
    usage: ResponsesUsage
    store: bool
    temperature: float
    top_p: float
    background: bool
    conversation: Conversation = Field(
        default_factory=lambda: Conversation(id=""), description="Where the request names one."
    )
    instructions: str | None
    max_output_tokens: int | None
    metadata: Any
    reasoning: dict[str, Any] = Field({}, description="The effort, if one was asked for.")
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: Any = Field("", description="As it was sent.")
    safety_identifier: Any = Field("", description="As it was sent.")
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    truncation: Literal["auto", "disabled"]
    user: str = Field("", description="As it was sent.")
    cached: bool = Field(description="Whether the answer came from the response cache.")


class DeletedResponse(BaseModel):
    """Answer of DELETE /v1/responses/{response_id}."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
