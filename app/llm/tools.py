"""Tools: how a model learns of functions, and the text format in which it calls them.

The chat template's own format is used where it is known. Other models get instructions in the
system message to use Hermes's.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, NotRequired, TypedDict

from app.llm.protocol import Grammar, SharedFrame, Tag, TagsGrammar

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


# Keywords by which a schema says what members an object has.
_ABOUT_MEMBERS = (
    *("properties", "additionalProperties", "patternProperties", "required"),
    *("$ref", "allOf", "anyOf", "oneOf", "enum", "const"),
)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call.

    Its name has letters, digits, ``_`` and ``-``. ``parameters`` is the JSON Schema of its
    arguments, which are an object; ``None`` is for no arguments. A ``strict`` schema is held in
    full or refused; ``where`` is the request field that has it, for errors.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    where: str = "tools"

    @property
    def schema(self) -> Mapping[str, Any]:
        """The schema of the arguments; ``{}`` alone matches where it says nothing of them."""
        given = self.parameters or {}
        if any(given.get(keyword) for keyword in _ABOUT_MEMBERS):
            return given
        return {"type": "object", "properties": {}, "additionalProperties": False}

    def definition(self) -> dict[str, Any]:
        """The function in the form that chat templates expect."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = dict(self.parameters or {"type": "object", "properties": {}})
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request.

    ``choice`` is ``auto`` where the model decides, ``required`` where it calls at least one, and
    ``=name`` where it calls the one with this name. One answer has several calls if ``parallel``.
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
    """A function's name, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call in OpenAI's form."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(TypedDict):
    """A message of a chat; see :meth:`PromptTokenizer.render_chat`.

    Only messages from callers have ``tool_calls``: :meth:`ToolFormat.as_text` turns them into text.
    """

    role: str
    content: str
    token_ids: NotRequired[list[int]]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[Sequence[ToolCall]]


_NAME = "NAME"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes calls, whose arguments are a JSON object.

    Attributes:
        mark: The text that announces calls; empty where a call's own beginning does.
        opening: What stands between the mark and the first call.
        head: What stands before a call's arguments, with ``NAME`` for the function's name.
        foot: What stands behind them.
        closing: What stands behind the last call.
        separator: What stands between calls that share one mark; ``None``: each has its own.
        in_template: Whether the chat template renders tools and their results.
        calls_in_template: Whether it renders calls from ``tool_calls``; else they are text.
        tools_in_system: Whether it reads tools from the system message, as JSON text.
    """

    mark: str
    opening: str
    head: str
    foot: str = ""
    closing: str = ""
    separator: str | None = None
    in_template: bool = True
    calls_in_template: bool = False
    tools_in_system: bool = False

    @property
    def trigger(self) -> str:
        """The text that every call, or every list of calls, begins with."""
        return self.mark or self.head.partition(_NAME)[0]

    @property
    def before_json(self) -> str:
        """The text behind which a call is JSON, or its first characters."""
        return self.trigger if self.head.startswith("{") else self.head.partition(_NAME)[2]

    def spells(self, token: str) -> bool:
        """Whether a token stands in the calls that a model writes."""
        return token in f"{self.mark}{self.opening}{self.head}{self.foot}{self.closing}"

    def written(self, calls: Sequence[CalledFunction]) -> str:
        """Calls as the model writes them."""
        bodies = [
            self.head.replace(_NAME, call["name"]) + (call["arguments"] or "{}") + self.foot
            for call in calls
        ]
        if self.separator is not None:
            bodies = [self.separator.join(bodies)]
        return "\n".join(f"{self.mark}{self.opening}{body}{self.closing}" for body in bodies)

    def grammar(self, use: ToolUse, text: Grammar | None = None) -> TagsGrammar:
        """The grammar of answers whose calls are calls of these tools.

        ``text`` is that of an answer without calls, if it must have a form.
        """
        begin, end = self.mark + self.opening, self.closing
        shared = None
        if self.separator is not None:
            shared, begin, end = SharedFrame(begin, self.separator, end), "", ""
        tags = [
            Tag(
                begin + self.head.replace(_NAME, tool.name),
                json.dumps(tool.schema),
                self.foot + end,
                strict=tool.strict,
                where=tool.where,
            )
            for tool in use.allowed
        ]
        required = use.choice != "auto"
        # A named tool is called once, as with OpenAI.
        single = not use.parallel or use.choice.startswith("=")
        if text is None or required or isinstance(text, TagsGrammar):
            return TagsGrammar(tags, self.trigger, required=required, single=single, shared=shared)
        return TagsGrammar(
            tags, self.trigger, required=True, single=single, otherwise=text, shared=shared
        )

    def as_text(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """Messages whose calls are replaced by the text that the model would have written.

        So prompts are the same whether a session or the caller kept the history.
        """
        return [self._message_as_text(m) for m in messages]

    def _message_as_text(self, message: ChatMessage) -> ChatMessage:
        parts = [message["content"]] if message["content"] else []
        called = [call["function"] for call in message.get("tool_calls", ())]
        if not called:
            return message
        parts.append(self.written(called))
        written: ChatMessage = {"role": message["role"], "content": "\n".join(parts)}
        if reasoning := message.get("reasoning_content"):
            written["reasoning_content"] = reasoning
        return written

    def for_template(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
    ) -> list[Mapping[str, Any]]:
        """Messages with tools and results as text; unchanged if the template renders tools."""
        if self.in_template and not (self.tools_in_system and tools):
            return list(messages)
        if self.in_template:
            return _tools_in_system(messages, tools)
        converted = _results_as_user(messages)
        if not tools:
            return converted
        lines = "\n".join(json.dumps(t.definition(), ensure_ascii=False) for t in tools)
        instructions = _INSTRUCTIONS.format(tools=lines)
        if converted and converted[0]["role"] == "system":
            instructions = f"{converted.pop(0)['content']}\n\n{instructions}"
        return [{"role": "system", "content": instructions}, *converted]


_OBJECT = '{"name": "NAME", "arguments": '
_HERMES = ToolFormat("<tool_call>", "\n", _OBJECT, "}", "\n</tool_call>")
_MISTRAL = ToolFormat(
    *("[TOOL_CALLS]", " [", _OBJECT, "}", "]"), separator=", ", calls_in_template=True
)
DEFAULT_FORMAT = replace(_HERMES, in_template=False)

# For each format the texts by which a chat template shows that it is this one.
_FORMATS: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (
    # Qwen 2.5 and 3, Hermes, SmolLM3, Granite 4. Qwen3-Coder writes XML in the same tags.
    (("<tool_call>",), _HERMES),
    (
        ("<|start_header_id|>", '"parameters": '),
        ToolFormat("", "", '{"name": "NAME", "parameters": ', "}"),
    ),
    # Phi 4 mini.
    (
        ("<|/tool|>", "'tools' in message"),
        ToolFormat(
            *("<|tool_call|>", "[", _OBJECT, "}", "]<|/tool_call|>"),
            separator=", ",
            tools_in_system=True,
        ),
    ),
    # Granite 3.
    (("<|tool_call|>",), ToolFormat("<|tool_call|>", "[", _OBJECT, "}", "]", separator=", ")),
    # Mistral from version 11 of its format on: Ministral 3, Devstral 2, Mistral Large 3.
    (
        ("[TOOL_CALLS]", "[ARGS]"),
        ToolFormat("[TOOL_CALLS]", "", "NAME[ARGS]", calls_in_template=True),
    ),
    # Mistral before that: Nemo; 7B v0.3 and Small 3.1, which write a blank.
    (("[TOOL_CALLS][",), replace(_MISTRAL, opening="[")),
    (("[TOOL_CALLS]",), _MISTRAL),
)


def tool_format(template: str) -> ToolFormat:
    """The format of calls that a Jinja chat template uses, or the default one."""
    if not re.search(r"\btools\b", template) or "<function=" in template:
        return DEFAULT_FORMAT
    found = (form for signs, form in _FORMATS if all(sign in template for sign in signs))
    return next(found, DEFAULT_FORMAT)


def _tools_in_system(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
) -> list[Mapping[str, Any]]:
    rest = list(messages)
    said = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else ""
    told = json.dumps([tool.definition()["function"] for tool in tools], ensure_ascii=False)
    content = said or "You are a helpful assistant with some tools."
    return [{"role": "system", "content": content, "tools": told}, *rest]


def _results_as_user(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Turn results of tools into user messages; adjacent results share one message."""
    converted: list[Mapping[str, Any]] = []
    for is_result, group in groupby(messages, lambda message: message["role"] == "tool"):
        if is_result:
            results = [f"<tool_response>\n{m['content']}\n</tool_response>" for m in group]
            converted.append({"role": "user", "content": "\n".join(results)})
        else:
            converted += group
    return converted
