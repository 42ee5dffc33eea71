"""Models that call tools: templates, tokens, and calls as each model writes them."""

import json
from dataclasses import dataclass
from typing import Any

from app.llm.tool_formats import tool_format
from app.llm.tools import Tool
from tests.data import call_templates
from tests.data import chat_templates as templates

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("add", {"a": 1, "b": "x\n</tool_call>]"}),
    ("now", {}),
    ("add", {"a": 2}),
]
TOOLS = (
    Tool(
        "add",
        "Adds.",
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    ),
    Tool("now"),
)
GIVEN = [json.dumps(arguments) for _, arguments in CALLS]
# Marks of all models, which a call's arguments may have.
MARKS = (
    "<tool_call><|tool_call>call:now{}<tool_call|></function> <parameter=c> [TOOL_CALLS]now[ARGS]"
    "<|tool_call|>[<|/tool_call|><|channel|>final<|message|>" + "".join(call_templates.CALL_TOKENS)
)


@dataclass(frozen=True)
class Model:
    """A model's template and tokens, and the calls of :data:`CALLS` as it writes them.

    Attributes:
        is_text: Whether its template takes calls as text of the answer.
    """

    template: str
    special: tuple[str, ...]
    written: str
    plain: tuple[str, ...] = ()
    is_text: bool = False

    @property
    def instructs(self) -> bool:
        """Whether the model is told of tools in the system message."""
        return not tool_format(self.template).in_template


def hermes(name: str, arguments: str) -> str:
    """A call as Hermes and Qwen write it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def qwen35(name: str, **arguments: str) -> str:
    """A call as Qwen 3.5 writes it."""
    given = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{given}</function>\n</tool_call>"


def deepseek(before: str, behind: str, end: str, separator: str) -> str:
    """The calls as DeepSeek writes them."""
    first, last, begin, ended, sep = call_templates.CALL_TOKENS
    each = (
        f"{begin}{before.format(sep=sep, name=name)}{behind}{GIVEN[i]}{end}{ended}"
        for i, (name, _) in enumerate(CALLS)
    )
    return f"{first}{separator.join(each)}{last}"


def harmony(name: str, arguments: str) -> str:
    """A call as gpt-oss writes it."""
    return f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}"


_HERMES = "\n".join(hermes(name, GIVEN[i]) for i, (name, _) in enumerate(CALLS))
MODELS = {
    "hermes": Model(templates.HERMES, (), _HERMES, is_text=True),
    # The markers of Qwen 2.5 and 3 are tokens, which are not special.
    "qwen": Model(
        templates.QWEN_THINKING, (), _HERMES, plain=("<tool_call>", "</tool_call>"), is_text=True
    ),
    "llama 3": Model(
        templates.LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
        "; ".join(
            f'{{"name": "{name}", "parameters": {GIVEN[i]}}}' for i, (name, _) in enumerate(CALLS)
        ),
        is_text=True,
    ),
    "mistral": Model(
        templates.MISTRAL,
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        f'[TOOL_CALLS] [{{"name": "add", "arguments": {GIVEN[0]}}}, '
        f'{{"name": "now", "arguments": {{}}}}, {{"name": "add", "arguments": {GIVEN[2]}}}]',
    ),
    "mistral nemo": Model(
        templates.MISTRAL_NEMO,
        ("[INST]", "[/INST]", "[TOOL_CALLS]"),
        f'[TOOL_CALLS][{{"name": "add", "arguments": {GIVEN[0]}, "id": "abc"}},'
        f'{{"name": "now", "arguments": {{}}, "id": "}}"}}, '
        f'{{"name":"add","arguments":{GIVEN[2]}}}]',
    ),
    "granite 3": Model(
        templates.GRANITE3,
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"),
        f'<|tool_call|>[{{"name": "add", "arguments": {GIVEN[0]}}}, '
        f'{{"name": "now", "arguments": {{}}}}, {{"name": "add", "arguments": {GIVEN[2]}}}]',
        is_text=True,
    ),
    "phi 4 mini": Model(
        templates.PHI4_MINI,
        ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        f'<|tool_call|>[{{"name": "add", "arguments": {GIVEN[0]}}}, {{"name": "now", '
        f'"arguments": {{}}}}, {{"name": "add", "arguments": {GIVEN[2]}}}]<|/tool_call|>',
        plain=("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"),
        is_text=True,
    ),
    "mistral args": Model(
        templates.MISTRAL_ARGS,
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[AVAILABLE_TOOLS]"),
        f"[TOOL_CALLS]add[ARGS]{GIVEN[0]}[TOOL_CALLS]now[ARGS]{{}}[TOOL_CALLS]add[ARGS]{GIVEN[2]}",
    ),
    "qwen 3.5": Model(
        call_templates.QWEN35,
        (),
        "\n".join(
            [qwen35("add", a="1", b="x\n</tool_call>]"), qwen35("now"), qwen35("add", a="2")]
        ),
        plain=("<tool_call>", "</tool_call>", "<think>", "</think>"),
        is_text=True,
    ),
    "deepseek v3.1": Model(
        call_templates.DEEPSEEK31,
        (),
        deepseek("{name}{sep}", "", "", ""),
        plain=(*call_templates.CALL_TOKENS, call_templates.USER, call_templates.ASSISTANT),
        is_text=True,
    ),
    "deepseek r1": Model(
        call_templates.DEEPSEEK_R1,
        (call_templates.USER, call_templates.ASSISTANT, *call_templates.CALL_TOKENS),
        deepseek("function{sep}{name}", "\n```json\n", "\n```", "\n"),
        is_text=True,
    ),
    "gemma 3": Model(
        templates.GEMMA3,
        ("<start_of_turn>", "<end_of_turn>"),
        "\n".join(
            f'```json\n{{"name": "{name}", "parameters": {GIVEN[i]}}}\n```'
            for i, (name, _) in enumerate(CALLS)
        ),
        is_text=True,
    ),
    "gemma 4": Model(
        call_templates.GEMMA4,
        ("<|tool_call>", "<tool_call|>", '<|"|>', "<|turn>", "<turn|>", "<|channel>", "<channel|>"),
        '<|tool_call>call:add{a:1,b:<|"|>x\n</tool_call>]<|"|>}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|><|tool_call>call:add{a:2}<tool_call|>",
    ),
    "gpt-oss": Model(
        call_templates.GPT_OSS,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>"),
        "".join(harmony(name, GIVEN[i]) for i, (name, _) in enumerate(CALLS)),
    ),
}
