"""Requests of the OpenAI routes; docs/api.md has a table of every field.

What OpenAI's clients send and this service cannot honour is refused, but for values that ask for
nothing: ``null``, and the neutral ones below.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from app.api.requests import RequestModel, SamplingFields
from app.llm.tools import ChatMessage, Tool, ToolCall, ToolUse

MAX_CHOICES = 16
MAX_PROMPTS = 32
MAX_TOOLS = 128
MAX_LOGIT_BIAS = 1024

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _text_of(content: Any) -> Any:
    """A message's text, which may come in parts; parts of other kinds are refused."""
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError("unsupported_parameter", "only text parts are supported")
        text = part.get("text")
        if not isinstance(text, str) or part.keys() != {"type", "text"}:
            raise PydanticCustomError("text_part", "a text part has a type and a text, a string")
        texts.append(text)
    return "".join(texts)


_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
Content = Annotated[
    str,
    BeforeValidator(_text_of),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}]}),
]


class CalledFunctionField(RequestModel):
    """A function that was called."""

    name: FunctionName
    arguments: str = Field(description="JSON text.")


class ToolCallField(RequestModel):
    """A call in an earlier answer."""

    id: str = Field(max_length=128)
    type: Literal["function"] = "function"
    function: CalledFunctionField


class OpenAIMessage(RequestModel):
    """One message of a chat."""

    neutral: ClassVar = {
        "refusal": (),
        "audio": (),
        "function_call": (),
        "name": (),
        "annotations": ([],),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = ""
    tool_calls: list[ToolCallField] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(None, max_length=128)

    @model_validator(mode="after")
    def _has_what_its_role_needs(self) -> Self:
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only messages of the role assistant have tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("messages of the role tool, and no others, have a tool_call_id")
        return self

    def as_message(self) -> ChatMessage:
        """The message as the services take it."""
        role = "system" if self.role == "developer" else self.role
        if not self.tool_calls:
            return {"role": role, "content": self.content}
        calls: list[ToolCall] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in self.tool_calls
        ]
        return {"role": role, "content": self.content, "tool_calls": calls}


class FunctionField(RequestModel):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = Field(None, max_length=8192)
    parameters: dict[str, Any] | None = Field(
        None, description="JSON Schema of the arguments, an object; see Structured output."
    )
    strict: bool = Field(False, description="Calls follow the schema either way.")


class ToolField(RequestModel):
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: FunctionField


class FunctionReference(RequestModel):
    """A function by its name."""

    name: FunctionName


class NamedToolChoice(RequestModel):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionReference


class StreamOptions(RequestModel):
    """What a stream tells beside the answer."""

    neutral: ClassVar = {"include_obfuscation": (False,)}

    include_usage: bool = Field(False, description="Tell the usage in a last chunk.")


class OpenAIFields(SamplingFields):
    """Fields that chat completions and completions share."""

    model: str = Field(min_length=1, max_length=256, description="GET /v1/models tells which.")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="How many answers; each takes a place.")
    logit_bias: dict[TokenId, Bias] = Field(
        {},
        max_length=MAX_LOGIT_BIAS,
        description="Added to the logits of tokens, by their ids.",
        json_schema_extra={"additionalProperties": False},
    )
    stream_options: StreamOptions | None = None
    user: str = Field(
        "", max_length=512, description="Your end user; kept answers are for one of them alone."
    )

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatCompletionRequest(OpenAIFields):
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
        "metadata": ({},),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_key": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": (),
        "reasoning_effort": ("none",),
        "safety_identifier": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": ("medium",),
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
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = Field(
        None, description="auto where there are tools."
    )
    parallel_tool_calls: bool = Field(True, description="Whether an answer may hold several calls.")

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ")
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: true")
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        choice = self.tool_choice
        if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
            raise ValueError("tool_choice names a function that is not in tools")
        if choice == "required" and not names:
            raise ValueError("tool_choice is required, but there are no tools")
        return self

    @property
    def tool_use(self) -> ToolUse | None:
        """The tools, if the model may call any."""
        if not self.tools or self.tool_choice == "none":
            return None
        tools = (tool.function for tool in self.tools)
        choice = self.tool_choice or "auto"
        return ToolUse(
            tuple(Tool(f.name, f.description, f.parameters) for f in tools),
            f"={choice.function.name}" if isinstance(choice, NamedToolChoice) else choice,
            self.parallel_tool_calls,
        )


def _prompts(prompt: Any) -> Any:
    """One or several prompts as a list of them."""
    if isinstance(prompt, list) and any(isinstance(p, int | list) for p in prompt):
        raise PydanticCustomError("unsupported_parameter", "prompts of token ids are not supported")
    return [prompt] if isinstance(prompt, str) else prompt


Prompt = Annotated[str, Field(min_length=1)]
_PROMPT = {"type": "string", "minLength": 1}
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
        list[Prompt],
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


class TokenizeRequest(RequestModel):
    """Body of POST /v1/tokenize; either a text or messages."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "Hello, world."}]})

    text: str | None = Field(None, min_length=1)
    messages: list[OpenAIMessage] | None = Field(None, min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.text is None) == (self.messages is None):
            raise ValueError("either text or messages")
        return self


class TokenizeResponse(BaseModel):
    """Answer of POST /v1/tokenize."""

    tokens: list[int] = Field(description="As the model would get them.")
    count: int
    max_tokens: int = Field(description="Most tokens of a prompt and its answer together.")


class ModelCard(BaseModel):
    """A name under which the model answers."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time at which the service started.")
    owned_by: str


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def chat_messages(messages: list[OpenAIMessage]) -> list[ChatMessage]:
    """Messages as the services take them; those that lead with instructions become one."""
    converted = [m.as_message() for m in messages]
    leading = 0
    while leading < len(converted) and converted[leading]["role"] == "system":
        leading += 1
    if leading < 2:
        return converted
    system = "\n\n".join(m["content"] for m in converted[:leading])
    return [{"role": "system", "content": system}, *converted[leading:]]
