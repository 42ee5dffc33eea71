"""Tools: how a model is told of functions, how it calls them, and how its calls are read.

A model's chat template decides the form where it has one for tools: Hermes's, which Qwen and many
others share, or Llama 3's. Models without one are told in the system message to use Hermes's.
Calls in a conversation's history become the text that the model itself would have written, so that
prompts are the same whether a session or the caller kept them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from app.llm.engine.base import Tag, TagsGrammar

_ANY_OBJECT: dict[str, Any] = {"type": "object"}

_INSTRUCTIONS = """\
You can call functions. Each line between <tools> and </tools> describes one:
<tools>
{tools}
</tools>
To call a function, write this and nothing else, with the function's own name and arguments:
<tool_call>
{{"name": "function_name", "arguments": {{"argument": "value"}}}}
</tool_call>
Its result comes back between <tool_response> and </tool_response>."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call.

    Attributes:
        name: Letters, digits, ``_`` and ``-``.
        description: What it is for.
        parameters: JSON Schema of its arguments, an object; ``None`` for none.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None

    def definition(self) -> dict[str, Any]:
        """The function as chat templates expect it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = dict(self.parameters or {"type": "object", "properties": {}})
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says about tools.

    Attributes:
        tools: What may be called.
        choice: ``auto`` leaves it to the model, ``required`` makes it call; a tool's name makes it
            call that one, written ``=name``.
        parallel: Whether one answer may hold several calls.
    """

    tools: tuple[Tool, ...]
    choice: str = "auto"
    parallel: bool = True

    @property
    def allowed(self) -> tuple[Tool, ...]:
        """The tools that an answer may call."""
        if self.choice.startswith("="):
            return tuple(t for t in self.tools if t.name == self.choice[1:])
        return self.tools


class CalledFunction(TypedDict):
    """A function and its arguments, as JSON text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call as OpenAI writes it."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(TypedDict):
    """A message as the services pass it; see :meth:`PromptTokenizer.render_chat`.

    ``tool_calls`` are in messages of callers alone: :meth:`ToolFormat.as_text` makes them content.
    """

    role: str
    content: str
    token_ids: NotRequired[list[int]]
    tool_calls: NotRequired[Sequence[ToolCall]]


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes calls.

    Attributes:
        opening: What stands before a call's JSON object; may be empty.
        closing: What stands after it; may be empty.
        arguments_key: Member of the object that holds the arguments.
        in_template: Whether the chat template tells the model of the tools, and takes their
            results.
    """

    opening: str
    closing: str
    arguments_key: str
    in_template: bool

    def _head(self, name: str) -> str:
        opening = f"{self.opening}\n" if self.opening else ""
        return f'{opening}{{"name": {json.dumps(name)}, "{self.arguments_key}": '

    @property
    def _tail(self) -> str:
        return "}" + (f"\n{self.closing}" if self.closing else "")

    @property
    def trigger(self) -> str:
        """The text with which every call begins."""
        return self.opening or '{"name": "'

    def grammar(self, use: ToolUse) -> TagsGrammar:
        """What an answer must look like, so that its calls are calls of these tools."""
        tags = [
            Tag(self._head(t.name), json.dumps(t.parameters or _ANY_OBJECT), self._tail)
            for t in use.allowed
        ]
        required = use.choice != "auto"
        # A named choice is for one call, as with OpenAI.
        single = not use.parallel or use.choice.startswith("=")
        return TagsGrammar(tags, self.trigger, required=required, single=single)

    def as_text(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """Messages without calls: each call is the text that the model would have written."""
        return [self._message_as_text(m) for m in messages]

    def _message_as_text(self, message: ChatMessage) -> ChatMessage:
        calls = message.get("tool_calls")
        if not calls:
            return message
        written = [
            self._head(c["function"]["name"]) + c["function"]["arguments"] + self._tail
            for c in calls
        ]
        said = [message["content"]] if message["content"] else []
        return {"role": message["role"], "content": "\n".join([*said, *written])}

    def for_template(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
    ) -> list[Mapping[str, Any]]:
        """Messages for a template that knows nothing of tools; unchanged for one that does."""
        if self.in_template:
            return list(messages)
        converted = _results_as_user(messages)
        if not tools:
            return converted
        lines = "\n".join(json.dumps(t.definition(), ensure_ascii=False) for t in tools)
        instructions = _INSTRUCTIONS.format(tools=lines)
        if converted and converted[0]["role"] == "system":
            system = {**converted[0], "content": f"{converted[0]['content']}\n\n{instructions}"}
            return [system, *converted[1:]]
        return [{"role": "system", "content": instructions}, *converted]


_HERMES = ToolFormat("<tool_call>", "</tool_call>", "arguments", in_template=True)
_LLAMA = ToolFormat("", "", "parameters", in_template=True)
DEFAULT_FORMAT = ToolFormat("<tool_call>", "</tool_call>", "arguments", in_template=False)


def tool_format(template: str) -> ToolFormat:
    """The form of calls that a chat template teaches.

    Args:
        template: The model's Jinja template.
    """
    if not re.search(r"\btools\b", template):
        return DEFAULT_FORMAT
    # Qwen3-Coder has Hermes's tags around arguments in XML.
    if "<tool_call>" in template and "<function=" not in template:
        return _HERMES
    if "<|python_tag|>" in template and '"parameters": ' in template:
        return _LLAMA
    return DEFAULT_FORMAT


def _results_as_user(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Tools' results as what the user says; those that follow each other in one message."""
    converted: list[Mapping[str, Any]] = []
    after_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if after_result:
                before = converted.pop()["content"]
                text = f"{before}\n{text}"
            converted.append({"role": "user", "content": text})
        else:
            converted.append(message)
        after_result = is_result
    return converted
