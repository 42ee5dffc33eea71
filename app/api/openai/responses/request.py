"""The body of POST /v1/responses."""

from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from app.api.openai.messages import MAX_TOOLS, Hint, OpenAIModel, only
from app.api.openai.responses.items import InputItem
from app.api.openai.schemas import OpenAISampling, PlatformHints
from app.api.openai.tools import FunctionField, FunctionName, check_tools, tool_use
from app.api.requests import Effort, JsonSchemaFormat, ResponseFormat
from app.llm.tools import Tool, ToolUse

LOGPROBS: Final = "message.output_text.logprobs"

ConversationId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
FunctionKind = Annotated[
    str, only(["function"], "only functions are supported"), WithJsonSchema({"const": "function"})
]


class ResponsesTool(FunctionField):
    """A function that the model may call."""

    neutral: ClassVar = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
    }

    type: FunctionKind
    output_schema: Hint = None


class FunctionChoice(OpenAIModel):
    """The one function that must be called."""

    type: FunctionKind
    name: FunctionName


class AllowedToolsChoice(OpenAIModel):
    """Some of the functions, as if there were no others."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FunctionChoice] = Field(min_length=1, max_length=MAX_TOOLS)


class TextFormat(OpenAIModel):
    """What the text must look like; see docs/api.md, Structured output."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = Field("", max_length=64)
    description: str = Field("", max_length=8192)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool = Field(False, description="Refuse a schema that cannot be held in full.")

    @model_validator(mode="after")
    def _has_a_schema_or_none(self) -> Self:
        if (self.schema_ is not None) != (self.type == "json_schema"):
            raise ValueError("the type json_schema, and no other, has a member schema")
        return self


class TextField(OpenAIModel):
    """How the answer's text is written."""

    format: TextFormat | None = None
    verbosity: Hint = None


class ReasoningField(OpenAIModel):
    """How the model reasons."""

    neutral: ClassVar = {"context": ("auto",), "mode": ("standard",)}

    effort: Effort | None = Field(
        None, description="How much the model reasons; as reasoning_effort on the other routes."
    )
    summary: Hint = None
    generate_summary: Hint = None


def _items_of(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _id_of(conversation: Any) -> Any:
    is_object = isinstance(conversation, dict) and conversation.keys() == {"id"}
    return conversation["id"] if is_object else conversation


class ResponsesRequest(OpenAISampling, PlatformHints):
    """Body of POST /v1/responses."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "default", "input": "What is the capital of France?"}]
        }
    )
    neutral: ClassVar = {
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "context_management": ([],),
        "image": (),
        "moderation": (),
        "prompt": (),
        "stream_options": ({}, {"include_obfuscation": False}),
    }
    n: ClassVar = 1
    schema_place: ClassVar = "text.format.schema"

    input: Annotated[
        list[InputItem],
        Field(min_length=1, max_length=1000),
        BeforeValidator(_items_of, json_schema_input_type=str | list[InputItem]),
    ]
    instructions: str | None = Field(
        None, description="A system message for this answer alone, before all others."
    )
    previous_response_id: str | None = Field(
        None, min_length=1, max_length=128, description="The kept response that is continued."
    )
    conversation: Annotated[
        ConversationId | None,
        BeforeValidator(_id_of),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "object", "properties": {"id": {"type": "string"}}},
                ]
            }
        ),
    ] = Field(None, description="Keeps the conversation, as session_id does on /v1/chat.")
    store: bool | None = Field(
        None, description="Whether the response is kept; default: where conversations are."
    )
    truncation: Literal["auto", "disabled"] = Field(
        "disabled", description="auto: the oldest kept turns are left out where they do not fit."
    )
    max_output_tokens: int | None = Field(
        None, ge=1, description="Most tokens to generate; by default model.max_tokens."
    )
    text: TextField | None = None
    tools: list[ResponsesTool] = Field([], max_length=MAX_TOOLS)
    tool_choice: (
        Literal["none", "auto", "required"] | FunctionChoice | AllowedToolsChoice | None
    ) = Field(None, description="auto where there are tools.")
    parallel_tool_calls: bool = Field(True, description="Whether an answer may hold several calls.")
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field(
        [], max_length=16, description="What else is told of the answer: log-probabilities."
    )
    top_logprobs: int = Field(
        0, ge=0, le=20, description="Tell so many of the likeliest tokens of each place."
    )
    reasoning: ReasoningField | None = None
    max_tool_calls: Hint = None

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if all(item.type == "reasoning" for item in self.input):
            raise ValueError("input has no message")
        if self.previous_response_id and self.conversation:
            raise ValueError("either previous_response_id or conversation")
        if self.truncation == "auto" and not (self.previous_response_id or self.conversation):
            raise ValueError("truncation auto is for previous_response_id and conversation")
        choice, named = self.tool_choice, list[FunctionChoice]()
        if isinstance(choice, FunctionChoice):
            named = [choice]
        elif isinstance(choice, AllowedToolsChoice):
            named = choice.tools
        names = [tool.name for tool in self.tools]
        check_tools(names, [function.name for function in named], choice == "required")
        return self

    @property
    def max_tokens(self) -> int | None:
        """Most tokens to generate, by its name on the other routes."""
        return self.max_output_tokens

    @property
    def effort(self) -> Effort | None:
        """How much the model reasons."""
        return self.reasoning.effort if self.reasoning else None

    @property
    def response_format(self) -> ResponseFormat | None:
        """The form of the text, as the other routes have it."""
        form = self.text.format if self.text else None
        if form is None:
            return None
        schema = None
        if form.schema_ is not None:
            fields = {"schema": form.schema_, "strict": form.strict}
            schema = JsonSchemaFormat.model_validate(fields)
        return ResponseFormat(type=form.type, json_schema=schema)

    @property
    def logprobs(self) -> int | None:
        """How many of the likeliest tokens are told, if log-probabilities are asked for."""
        return self.top_logprobs if self.top_logprobs or LOGPROBS in self.include else None

    @property
    def tool_use(self) -> ToolUse | None:
        """The tools, if the model may call any."""
        choice, only = self.tool_choice or "auto", None
        if isinstance(choice, AllowedToolsChoice):
            only = {function.name for function in choice.tools}
            choice = choice.mode
        name = f"={choice.name}" if isinstance(choice, FunctionChoice) else choice
        tools = tuple(
            Tool(t.name, t.description, t.parameters, t.strict, f"tools.{i}.parameters")
            for i, t in enumerate(self.tools)
        )
        return tool_use(tools, name, self.parallel_tool_calls, only)

    def echo(self) -> dict[str, Any]:
        """The members of a response that repeat the request."""
        sent = self.model_dump(
            include={"metadata", "prompt_cache_key", "safety_identifier", "user"},
            exclude_unset=True,
        )
        choice = self.tool_choice or "auto"
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": self.parallel_tool_calls,
            "previous_response_id": self.previous_response_id,
            **({"reasoning": {"effort": self.effort}} if self.effort else {}),
            **({"conversation": {"id": self.conversation}} if self.conversation else {}),
            "text": {"format": {"type": "text"}} | (_dump(self.text) if self.text else {}),
            "tool_choice": choice if isinstance(choice, str) else _dump(choice),
            "tools": [_dump(tool) | {"strict": tool.strict} for tool in self.tools],
            "top_logprobs": self.top_logprobs,
            "truncation": self.truncation,
            **sent,
        }


def _dump(model: OpenAIModel) -> dict[str, Any]:
    return model.model_dump(exclude_unset=True, by_alias=True)
