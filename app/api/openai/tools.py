"""Tools in the OpenAI routes' requests."""

from typing import Annotated, Any, Literal

from pydantic import Field

from app.api.openai.messages import MAX_TOOLS, Hint, OpenAIModel
from app.llm.tools import Tool, ToolUse

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionField(OpenAIModel):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="JSON Schema of the arguments, an object; see Structured output."
    )
    strict: bool = Field(False, description="Refuse a schema that cannot be held in full.")
    annotations: Hint = None
    cache_control: Hint = None


class ToolField(OpenAIModel):
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: FunctionField
    annotations: Hint = None
    cache_control: Hint = None


class FunctionReference(OpenAIModel):
    """A function by its name."""

    name: FunctionName


class NamedToolChoice(OpenAIModel):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionReference


class AllowedTools(OpenAIModel):
    """Some of the functions, as if there were no others."""

    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolsChoice(OpenAIModel):
    """The functions that may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def tools_of(fields: list[ToolField]) -> tuple[Tool, ...]:
    """Tools as the services take them."""
    functions = (field.function for field in fields)
    return tuple(
        Tool(f.name, f.description, f.parameters, f.strict, f"tools.{i}.function.parameters")
        for i, f in enumerate(functions)
    )


def tool_use(
    tools: tuple[Tool, ...], choice: str, parallel: bool, only: set[str] | None
) -> ToolUse | None:
    """What the model may call of ``tools``: those named in ``only``, if there is such a set."""
    if choice == "none" or not tools:
        return None
    return ToolUse(tuple(t for t in tools if only is None or t.name in only), choice, parallel)


def check_tools(names: list[str], chosen: list[str], required: bool) -> None:
    """Check the names of tools, and those that tool_choice has.

    Raises:
        ValueError: They do not fit.
    """
    if len(set(names)) < len(names):
        raise ValueError("two tools have the same name")
    if not set(chosen) <= set(names):
        raise ValueError("tool_choice names a function that is not in tools")
    if required and not names:
        raise ValueError("tool_choice is required, but there are no tools")
