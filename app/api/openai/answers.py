"""Answers of the OpenAI routes, by OpenAI's API reference.

Beside OpenAI's members, ``cached`` tells whether an answer came from the response cache.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from app.api.schemas import Usage
from app.llm.report import FinishReason


class CalledFunction(BaseModel):
    """A function and its arguments."""

    name: str
    arguments: str = Field(description="JSON text.")


class FunctionCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None = Field(description="null where the answer is calls alone.")
    refusal: None
    reasoning_content: str = Field("", description="Left out where there is none.")
    reasoning: str = Field("", description="The same, if model.reasoning_names has it.")
    tool_calls: list[FunctionCall] = Field([], description="Left out where there are none.")


class LikelyToken(BaseModel):
    """A token and its probability by the model alone."""

    token: str
    logprob: float = Field(description="Natural logarithm.")
    bytes: list[int]


class ChatToken(LikelyToken):
    """A token of the answer, and the likeliest tokens of its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat's answer."""

    content: list[ChatToken]
    refusal: None


class ChatChoice(BaseModel):
    """One answer to a chat."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal[FinishReason, "tool_calls"]


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion; the lists have an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int] = Field(description="Where in the text each begins, in characters.")


class CompletionChoice(BaseModel):
    """One completion of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class OpenAIAnswer(BaseModel):
    """What chat completions and completions share."""

    id: str
    object: str
    created: int = Field(description="Unix time.")
    model: str
    choices: list[Any]
    usage: Usage
    system_fingerprint: str = Field(
        description="Changes whenever the same seed may give another answer."
    )
    cached: bool = Field(description="Whether every answer came from the response cache.")


class ChatCompletion(OpenAIAnswer):
    """Answer of POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Completion(OpenAIAnswer):
    """Answer of POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
