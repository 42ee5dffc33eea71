"""Tools: how a model learns of functions, and the text in which it calls them.

The formats of models are in :mod:`app.llm.tool_formats`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, NotRequired, TypedDict

from app.llm import notations
from app.llm.protocol import Grammar, Notation, SharedFrame, Tag, TagsGrammar

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
        """The function in the form that chat templates expect; some add to the description."""
        parameters = dict(self.parameters or {"type": "object", "properties": {}})
        told = {"name": self.name, "description": self.description or "", "parameters": parameters}
        return {"type": "function", "function": told}


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
    """How a model writes calls, and is told of functions.

    Attributes:
        mark: The text that announces calls; empty where a call's own beginning does.
        opening: What stands between the mark and the first call.
        head: What stands before a call's arguments, with ``NAME`` for the function's name.
        foot: What stands behind them.
        closing: What stands behind the last call.
        separator: What stands between calls that share one mark; ``None``: each has its own.
        notation: How the arguments are written.
        fence: What the model may write around a call; the three characters behind it end it.
        is_single: Whether an answer, and a message of the template, has one call.
        text_header: What stands before an answer's text where a call has a header of its own.
        instructions: What the system message says of the functions, at ``{tools}``, to a template
            that does not know of them.
        described: What they say of each one.
        result: A result as a part of a message of the user; ``None``: the template writes results.
        calls_in_template: Whether the template renders calls from ``tool_calls``; else they are
            text.
        results_in_call: Whether it reads results from the message that called.
        tools_in_system: Whether it reads tools from the system message, as JSON text.
    """

    mark: str
    opening: str
    head: str
    foot: str = ""
    closing: str = ""
    separator: str | None = None
    notation: Notation = "json"
    fence: str = ""
    is_single: bool = False
    text_header: str = ""
    instructions: str = ""
    described: str = "{definition}"
    result: str | None = None
    calls_in_template: bool = False
    results_in_call: bool = False
    tools_in_system: bool = False

    @property
    def in_template(self) -> bool:
        """Whether the chat template renders tools."""
        return not self.instructions

    @property
    def trigger(self) -> str:
        """The text that every call, or every list of calls, begins with."""
        return self.mark or self.head.partition(_NAME)[0]

    @property
    def before_json(self) -> str:
        """The text behind which a call is JSON, if it is, or its first characters."""
        if self.notation != "json" or self.head.startswith("{"):
            return self.trigger
        return self.head.partition(_NAME)[2]

    def spells(self, token: str) -> bool:
        """Whether a token stands in the calls that a model writes."""
        marks = notations.GEMMA_QUOTE if self.notation == "gemma" else ""
        return token in f"{self.mark}{self.opening}{self.head}{self.foot}{self.closing}{marks}"

    def with_tokens(self, named: Callable[[str], str]) -> "ToolFormat":
        """The format with tokens in the instructions, as ``named`` writes them in a text."""
        return replace(self, instructions=named(self.instructions))

    def written(self, calls: Sequence[CalledFunction]) -> str:
        """Calls as the model writes them."""
        bodies = [
            self.head.replace(_NAME, call["name"])
            + notations.written(self.notation, call["arguments"])
            + self.foot
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
        head, foot = self.head, self.foot + end
        if self.notation == "gemma":
            # The grammar writes the braces with what is between them.
            head, foot = head.removesuffix("{"), foot.removeprefix("}")
        tags = [
            Tag(
                begin + head.replace(_NAME, tool.name),
                json.dumps(tool.schema),
                foot,
                strict=tool.strict,
                where=tool.where,
                notation=self.notation,
            )
            for tool in use.allowed
        ]
        required = use.choice != "auto"
        # A named tool is called once, as with OpenAI.
        single = self.is_single or not use.parallel or use.choice.startswith("=")
        otherwise = None if required or isinstance(text, TagsGrammar) else text
        return TagsGrammar(
            tags,
            self.trigger,
            required=required or otherwise is not None,
            single=single,
            otherwise=otherwise,
            text_begin=self.text_header,
            shared=shared,
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
        """Messages with tools and results as text, as far as the template does not render them."""
        if self.tools_in_system and tools:
            return _tools_in_system(messages, tools)
        converted = list(messages) if self.result is None else _as_user(messages, self.result)
        if self.in_template or not tools:
            return converted
        instructions = self.instructions.format(tools=self._described(tools))
        if converted and converted[0]["role"] == "system":
            instructions = f"{converted.pop(0)['content']}\n\n{instructions}"
        return [{"role": "system", "content": instructions}, *converted]

    def _described(self, tools: Sequence[Tool]) -> str:
        return "\n".join(
            self.described.format(
                name=tool.name,
                description=tool.description or "",
                parameters=json.dumps(tool.schema, ensure_ascii=False),
                definition=json.dumps(tool.definition(), ensure_ascii=False),
            )
            for tool in tools
        )


def _tools_in_system(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
) -> list[Mapping[str, Any]]:
    rest = list(messages)
    said = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else ""
    told = json.dumps([tool.definition()["function"] for tool in tools], ensure_ascii=False)
    content = said or "You are a helpful assistant with some tools."
    return [{"role": "system", "content": content, "tools": told}, *rest]


def _as_user(messages: Sequence[Mapping[str, Any]], result: str) -> list[Mapping[str, Any]]:
    """Turn results of tools into user messages; adjacent results share one message."""
    converted: list[Mapping[str, Any]] = []
    for is_result, group in groupby(messages, lambda message: message["role"] == "tool"):
        if is_result:
            results = [result.format(m["content"]) for m in group]
            converted.append({"role": "user", "content": "\n".join(results)})
        else:
            converted += group
    return converted
