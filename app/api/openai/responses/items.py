"""Items of a request's input: messages, calls of functions, their results, and reasoning.

All but messages of the roles user, system and developer are what a client sends back: of them only
what the model reads is taken.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from app.api.openai.messages import ONLY_TEXT, Hint, OpenAIModel, only, with_one_system
from app.llm.tools import ChatMessage, ToolCall

# The members of each type of item that are read.
_READ: Final = {
    "message": ("type", "role", "content"),
    "function_call": ("type", "call_id", "name", "arguments"),
    "function_call_output": ("type", "call_id", "output"),
    "reasoning": ("type", "content"),
    "item_reference": ("type", "id"),
}
_ONLY_READ: Final = "only items of these types are supported: " + ", ".join(_READ)
_TEXT_KINDS: Final = ("input_text", "output_text", "reasoning_text")


class InputText(OpenAIModel):
    """A part of an item; other kinds are refused."""

    type: Annotated[str, only(_TEXT_KINDS, ONLY_TEXT), WithJsonSchema({"enum": [*_TEXT_KINDS]})]
    text: str
    annotations: Hint = None
    cache_control: Hint = None
    prompt_cache_breakpoint: Hint = None


def _parts_of(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


Parts = Annotated[
    list[InputText], BeforeValidator(_parts_of, json_schema_input_type=str | list[InputText])
]


class InputItem(OpenAIModel):
    """One item of the input."""

    type: Annotated[
        str, only(_READ, _ONLY_READ), WithJsonSchema({"enum": [*_READ], "type": "string"})
    ] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = Field(
        None, description="Of a message."
    )
    content: Parts | None = Field(None, description="Of a message, and of reasoning.")
    call_id: str | None = Field(None, description="Of a call and of its result.")
    name: str | None = Field(None, description="Of a call: the function.")
    arguments: str | None = Field(None, description="Of a call: JSON text.")
    output: Parts | None = Field(None, description="Of a call's result.")
    id: str | None = Field(None, description="Of a reference: an item of a kept response.")
    status: Hint = None
    phase: Hint = None
    cache_control: Hint = None

    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if isinstance(data, dict):
            if "type" not in data and data.keys() == {"id"}:
                data = {**data, "type": "item_reference"}
            read = _READ.get(str(data.get("type") or "message"), ())
            if read and ("role" not in read or data.get("role") == "assistant"):
                data = {name: data[name] for name in read if name in data}
                if isinstance(content := data.get("content"), list):
                    data["content"] = list(filter(None, map(_part_sent_back, content)))
        return super()._without_neutral(data)

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> Self:
        needed = set(_READ[self.type]) - {"type"}
        if self.type == "reasoning":
            # Of another server's it may be encrypted.
            needed &= self.model_fields_set
        # OpenAI's client gives messages of a user an id, which nothing refers to.
        sent = self.model_fields_set & {name for names in _READ.values() for name in names}
        if self.type == "message":
            sent -= {"id"}
        if missing := needed - sent:
            raise ValueError(f"{min(missing)} is missing")
        if other := sent - needed - {"type"}:
            raise ValueError(f"an item of this type has no {min(other)}")
        return self

    @property
    def text(self) -> str:
        """What a message or a result says."""
        return "".join(part.text for part in self.content or self.output or ())


def _part_sent_back(part: Any) -> Any:
    """A part of an earlier answer; ``None`` if it is no text."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("output_text", "input_text", "reasoning_text", "text"):
        return {"type": "output_text", "text": part.get("text")}
    return {"type": "output_text", "text": part.get("refusal")} if kind == "refusal" else None


def input_messages(items: Sequence[InputItem]) -> list[ChatMessage]:
    """Items as the services take them: calls are a part of the assistant's message before them."""
    messages: list[ChatMessage] = []
    reasoning = ""
    for item in items:
        if item.type == "reasoning":
            reasoning = item.text
            continue
        if item.type == "function_call":
            before: ChatMessage | None = messages.pop() if _is_answer(messages) else None
            said: ChatMessage = before or {"role": "assistant", "content": ""}
            messages.append({**said, "tool_calls": [*said.get("tool_calls", ()), _call(item)]})
        elif item.type == "function_call_output":
            messages.append({"role": "tool", "content": item.text})
        else:
            role = "system" if item.role == "developer" else str(item.role)
            messages.append({"role": role, "content": item.text})
        if reasoning and _is_answer(messages):
            messages[-1]["reasoning_content"] = reasoning
        reasoning = ""
    return with_one_system(messages)


def _is_answer(messages: Sequence[ChatMessage]) -> bool:
    return bool(messages) and messages[-1]["role"] == "assistant"


def _call(item: InputItem) -> ToolCall:
    return {
        "id": item.call_id or "",
        "type": "function",
        "function": {"name": item.name or "", "arguments": item.arguments or ""},
    }
