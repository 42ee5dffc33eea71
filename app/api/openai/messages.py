"""Messages of the OpenAI routes' requests, and what all parts of these requests share.

A message of the role assistant is an earlier answer that a client sends back, of this service or of
another one: what it carries beside its text and its calls is taken, and not read.
"""

import json
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from app.api.requests import RequestModel
from app.llm.tools import ChatMessage, ToolCall

MAX_TOOLS: Final = 128

_HINT: Final = object()

Hint = Annotated[Any, Field(description="Taken, without effect."), _HINT]
"""A field that asks nothing of the answer."""


class OpenAIModel(RequestModel):
    """Base of the OpenAI routes' bodies and their parts; null asks for nothing in any field."""

    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        kept = super()._without_neutral(data)
        if not isinstance(kept, dict):
            return kept
        return {name: value for name, value in kept.items() if value is not None}

    @classmethod
    def honoured(cls) -> set[str]:
        """The names of the fields that have an effect."""
        return {name for name, field in cls.model_fields.items() if _HINT not in field.metadata}

    def hints(self) -> Iterator[str]:
        """The names of the fields without effect that were sent, in parts too."""
        for name in self.model_fields_set:
            value = getattr(self, name)
            if _HINT in type(self).model_fields[name].metadata:
                yield name
            for part in value if isinstance(value, list) else (value,):
                if isinstance(part, OpenAIModel):
                    yield from part.hints()


def only(kinds: Collection[str], message: str) -> BeforeValidator:
    """Refuses every kind of a part, an item or a tool but these, with a message."""

    def check(kind: Any) -> Any:
        if not isinstance(kind, str) or kind not in kinds:
            raise PydanticCustomError("unsupported_parameter", message)
        return kind

    return BeforeValidator(check)


ONLY_TEXT: Final = "only text parts are supported"


class TextPart(OpenAIModel):
    """A part of a message; other kinds are refused."""

    type: Annotated[str, only(["text"], ONLY_TEXT), WithJsonSchema({"const": "text"})]
    text: str
    annotations: Hint = None
    cache_control: Hint = None


def _parts_of(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Content = Annotated[
    list[TextPart],
    BeforeValidator(_parts_of, json_schema_input_type=str | list[TextPart]),
]


def _text_of(arguments: Any) -> Any:
    return json.dumps(arguments) if isinstance(arguments, dict) else arguments


class CalledFunctionField(OpenAIModel):
    """A function that was called."""

    model_config = ConfigDict(extra="ignore")

    name: str
    arguments: Annotated[str, BeforeValidator(_text_of, json_schema_input_type=str | dict)] = Field(
        "{}", description="JSON text; also what it says."
    )


class ToolCallField(OpenAIModel):
    """A call in an earlier answer."""

    model_config = ConfigDict(extra="ignore")

    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunctionField


class OpenAIMessage(OpenAIModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = Field(default_factory=list)
    tool_calls: list[ToolCallField] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: str | None = None
    reasoning_content: str = Field("", description="Of an earlier answer; also as reasoning.")
    name: Hint = None
    cache_control: Hint = None

    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        is_answer = isinstance(data, dict) and data.get("role") == "assistant"
        return super()._without_neutral(_sent_back(data) if is_answer else data)

    @model_validator(mode="after")
    def _has_what_its_role_needs(self) -> Self:
        if "content" not in self.model_fields_set:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only messages of the role assistant have tool_calls")
        if self.reasoning_content and self.role != "assistant":
            raise ValueError("only messages of the role assistant have reasoning_content")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("messages of the role tool, and no others, have a tool_call_id")
        return self

    def as_message(self) -> ChatMessage:
        """The message as the services take it."""
        role = "system" if self.role == "developer" else self.role
        content = "".join(part.text for part in self.content)
        message: ChatMessage = {"role": role, "content": content}
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if not self.tool_calls:
            return message
        calls: list[ToolCall] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in self.tool_calls
        ]
        return {**message, "tool_calls": calls}


def _sent_back(answer: dict[str, Any]) -> dict[str, Any]:
    """What is read of an earlier answer: its text, or its refusal, its calls and its reasoning."""
    # A call in the form that came before tool_calls would be lost, so it is refused by its name.
    read = ("role", "content", "tool_calls", "function_call")
    kept = {name: value for name, value in answer.items() if name in read}
    told = [answer.get(name) for name in ("reasoning_content", "reasoning")]
    kept["reasoning_content"] = next((text for text in told if isinstance(text, str)), None)
    content = kept.get("content")
    if isinstance(content, list):
        content = [part for part in map(_part_sent_back, content) if part is not None]
    elif content is None:
        content = answer.get("refusal") or ""
    return {**kept, "content": content}


def _part_sent_back(part: Any) -> Any:
    """A part of an earlier answer; ``None`` if it is no text, such as the model's reasoning."""
    kind = part.get("type") if isinstance(part, dict) else "text"
    if kind == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part if kind == "text" else None


def chat_messages(messages: list[OpenAIMessage]) -> list[ChatMessage]:
    """Messages as the services take them; those that lead with instructions become one."""
    return with_one_system([m.as_message() for m in messages])


def with_one_system(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Messages whose leading ones of the role system are joined into one."""
    leading = 0
    while leading < len(messages) and messages[leading]["role"] == "system":
        leading += 1
    if leading < 2:
        return messages
    system = "\n\n".join(m["content"] for m in messages[:leading])
    return [{"role": "system", "content": system}, *messages[leading:]]
