"""Requests of the OpenAI routes; docs/api.md has a table of every field.

A field is honoured; or it asks nothing of the answer, and is taken without effect; or it is refused
by its name, but for values that ask for nothing: ``null``, and the neutral ones below.
"""

from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from app.api.openai.messages import MAX_TOOLS, Hint, OpenAIMessage, OpenAIModel
from app.api.openai.tools import (
    AllowedToolsChoice,
    NamedToolChoice,
    ToolField,
    check_tools,
    tool_use,
    tools_of,
)
from app.api.requests import (
    MAX_STOP_CHARS,
    JsonSchemaFormat,
    ReasoningFields,
    ResponseFormat,
    Sampling,
    SamplingFields,
    StopString,
)
from app.llm.tools import ToolUse

MAX_CHOICES = 16
MAX_PROMPTS = 32
MAX_LOGIT_BIAS = 1024
MAX_STOPS = 16
# More than any answer has.
_NEVER_ENDS: Final = 2**31 - 1

TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(OpenAIModel):
    """What a stream tells beside the answer."""

    neutral: ClassVar = {"include_obfuscation": (False,)}

    include_usage: bool = Field(False, description="Tell the usage in a last chunk.")
    continuous_usage_stats: Hint = None


def _stop_strings(stop: Any) -> Any:
    """One or several stop strings as a list of them; an empty one stops nothing."""
    strings = [stop] if isinstance(stop, str) else stop
    return [s for s in strings if s != ""] if isinstance(strings, list) else strings


_STOP = {"type": "string", "maxLength": MAX_STOP_CHARS}


class OpenAISampling(OpenAIModel, Sampling):
    """How tokens are chosen; shared by OpenAI's generating routes."""

    model: str = Field(min_length=1, max_length=256, description="GET /v1/models tells which.")
    logit_bias: dict[TokenId, Bias] = Field(
        {},
        max_length=MAX_LOGIT_BIAS,
        description="Added to the logits of tokens, by their ids.",
        json_schema_extra={"additionalProperties": False},
    )
    top_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Only the likeliest tokens up to this sum; 0: the likeliest; default: the "
        "model's, or 1.",
    )
    top_k: int | None = Field(
        None,
        ge=-1,
        le=1_000_000,
        description="Only the k likeliest tokens; 0 and -1: all; default: the model's, or 0.",
    )
    stop: Annotated[
        list[StopString],
        Field(max_length=MAX_STOPS),
        BeforeValidator(_stop_strings),
        WithJsonSchema(
            {"anyOf": [_STOP, {"type": "array", "maxItems": MAX_STOPS, "items": _STOP}]}
        ),
    ] = Field(
        [], description="The answer ends before the first of these; a string, or up to sixteen."
    )
    min_tokens: int = Field(
        0, ge=0, le=_NEVER_ENDS, description="The model may not end the answer before."
    )
    ignore_eos: bool = Field(
        False, description="The model may not end the answer: it has max_tokens tokens."
    )
    user: str = Field(
        "", max_length=512, description="Your end user; kept answers are for one of them alone."
    )

    @model_validator(mode="after")
    def _say_the_same_by_other_fields(self) -> Self:
        if self.ignore_eos:
            self.min_tokens = _NEVER_ENDS
        if self.top_p == 0:
            self.temperature, self.top_p = 0.0, 1.0
        if self.top_k == -1:
            self.top_k = 0
        return self


class OpenAIJsonSchema(OpenAIModel, JsonSchemaFormat):
    """A JSON schema; null asks for nothing beside it."""


class OpenAIResponseFormat(OpenAIModel, ResponseFormat):
    """What the answer must look like; see docs/api.md, Structured output."""

    json_schema: OpenAIJsonSchema | None = None


class OpenAIFields(OpenAISampling, SamplingFields):
    """Fields that chat completions and completions share."""

    schema_place: ClassVar = "response_format.json_schema.schema"

    response_format: OpenAIResponseFormat | None = Field(
        None, description="What the answer must look like."
    )

    n: int = Field(1, ge=1, le=MAX_CHOICES, description="How many answers; each takes a place.")
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class PlatformHints(OpenAIModel):
    """Fields for OpenAI's own platform, without effect here."""

    metadata: Hint = None
    prompt_cache_key: Hint = None
    prompt_cache_options: Hint = None
    prompt_cache_retention: Hint = None
    safety_identifier: Hint = None
    service_tier: Hint = None


class ChatCompletionRequest(OpenAIFields, ReasoningFields, PlatformHints):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "default",
                    "messages": [{"role": "user", "content": "What is the capital of France?"}],
                    "max_completion_tokens": 100,
                }
            ],
        }
    )
    neutral: ClassVar = {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "web_search_options": (),
    }

    messages: list[OpenAIMessage] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(
        None, ge=1, description="The same as max_tokens; if both are sent, they must agree."
    )
    logprobs: bool = Field(False, description="Tell each token's log-probability.")
    top_logprobs: int = Field(
        0, ge=0, le=20, description="Tell so many of the likeliest tokens beside it."
    )
    tools: list[ToolField] = Field([], max_length=MAX_TOOLS)
    tool_choice: (
        Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice | None
    ) = Field(None, description="auto where there are tools.")
    parallel_tool_calls: bool = Field(True, description="Whether an answer may hold several calls.")
    store: Hint = None
    verbosity: Hint = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ")
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: true")
        choice, named = self.tool_choice, list[NamedToolChoice]()
        if isinstance(choice, NamedToolChoice):
            named = [choice]
        elif isinstance(choice, AllowedToolsChoice):
            named = choice.allowed_tools.tools
        names = [tool.function.name for tool in self.tools]
        check_tools(names, [one.function.name for one in named], choice == "required")
        return self

    @property
    def tool_use(self) -> ToolUse | None:
        """The tools, if the model may call any."""
        choice, only = self.tool_choice or "auto", None
        if isinstance(choice, AllowedToolsChoice):
            only = {one.function.name for one in choice.allowed_tools.tools}
            choice = choice.allowed_tools.mode
        name = f"={choice.function.name}" if isinstance(choice, NamedToolChoice) else choice
        return tool_use(tools_of(self.tools), name, self.parallel_tool_calls, only)


def _prompts(prompt: Any) -> Any:
    """One or several prompts as a list of them."""
    if isinstance(prompt, list) and any(isinstance(p, int | list) for p in prompt):
        raise PydanticCustomError("unsupported_parameter", "prompts of token ids are not supported")
    return [prompt] if isinstance(prompt, str) else prompt


_PROMPT = {"type": "string"}
_PROMPTS = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _PROMPT}


class CompletionRequest(OpenAIFields):
    """Body of POST /v1/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "default", "prompt": "The capital of France is", "max_tokens": 20}
            ]
        }
    )
    neutral: ClassVar = {"best_of": (1,), "echo": (False,), "suffix": ("",)}

    prompt: Annotated[
        list[str],
        Field(min_length=1, max_length=MAX_PROMPTS),
        BeforeValidator(_prompts),
        WithJsonSchema({"anyOf": [_PROMPT, _PROMPTS]}),
    ]
    logprobs: int | None = Field(
        None, ge=0, le=5, description="Tell log-probabilities, of so many of the likeliest tokens."
    )

    @model_validator(mode="after")
    def _choices_are_bounded(self) -> Self:
        if self.n * len(self.prompt) > MAX_PROMPTS:
            raise ValueError(f"prompts times n: at most {MAX_PROMPTS}")
        return self


class TokenizeRequest(OpenAIModel, ReasoningFields):
    """Body of POST /v1/tokenize: a text, or messages and what else is in a chat's prompt."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "Hello, world."}]})

    text: str | None = Field(None, min_length=1)
    messages: list[OpenAIMessage] | None = Field(None, min_length=1, max_length=1000)
    tools: list[ToolField] = Field([], max_length=MAX_TOOLS)
    return_token_strs: bool = Field(False, description="Tell the text of each token too.")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.text is None) == (self.messages is None):
            raise ValueError("either text or messages")
        of_chats = {"tools", *ReasoningFields.model_fields}
        if self.text is not None and (sent := of_chats & self.model_fields_set):
            raise ValueError(f"{min(sent)} is for messages")
        check_tools([tool.function.name for tool in self.tools], [], False)
        return self


class TokenizeResponse(BaseModel):
    """Answer of POST /v1/tokenize."""

    tokens: list[int] = Field(description="As the model would get them.")
    count: int
    max_tokens: int = Field(description="Most tokens of a prompt and its answer together.")
    token_strs: list[str] = Field(
        [], description="The text of each token, a part of a character as U+FFFD; where asked for."
    )


class ModelCard(BaseModel):
    """A name under which the model answers, and what requests may ask of it."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time at which the service started.")
    owned_by: str
    context_length: int | None = Field(
        description="Most tokens of a prompt and its answer together, once the model is loaded."
    )
    max_tokens: int = Field(description="Most tokens of an answer.")
    supported_parameters: list[str] = Field(
        description="The fields that model and engine honour, once it is loaded; as in /status."
    )


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
