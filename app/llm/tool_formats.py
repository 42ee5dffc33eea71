"""The formats in which models call tools; the chat template shows which one a model has.

Other models get instructions in the system message to use Hermes's.
"""

import re
from dataclasses import replace

from app.llm.notations import BEHIND_NAME
from app.llm.tools import ToolFormat

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

# The form that Google describes for Gemma 3, which has none of its own.
_FOR_GEMMA = """\
You can call functions. Each line describes one:
{tools}
To call a function, write it in the format of \
{{"name": function name, "parameters": dictionary of argument name and its value}} \
and write no other text. Its result comes back in a block of the kind tool_output."""

# DeepSeek describes this form beside its templates, which do not know of tools.
_FOR_DEEPSEEK = """\
## Tools
You have access to the following tools:

{{tools}}
ALWAYS use this exact format to call a tool:
{call}

- `tool_call_name` is the name of one of these tools.
- `tool_call_arguments` is a JSON object that follows the tool's parameters.
- Several calls {several}."""

_OBJECT = '{"name": "NAME", "arguments": '
_PARAMETERS = '{"name": "NAME", "parameters": '
_HERMES = ToolFormat("<tool_call>", "\n", _OBJECT, "}", "\n</tool_call>")
_MISTRAL = ToolFormat(
    *("[TOOL_CALLS]", " [", _OBJECT, "}", "]"), separator=", ", calls_in_template=True
)
_GEMMA3 = ToolFormat("", "", _PARAMETERS, "}", fence="```json")
DEFAULT_FORMAT = replace(
    _HERMES, instructions=_INSTRUCTIONS, result="<tool_response>\n{}\n</tool_response>"
)


def _deepseek(head: str, foot: str, separator: str, several: str) -> ToolFormat:
    begin, end = (
        "<\uff5ctool\u2581calls\u2581begin\uff5c>",
        "<\uff5ctool\u2581calls\u2581end\uff5c>",
    )
    one = "<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>"
    form = ToolFormat(begin, "", one[0] + head, foot + one[1], end, separator=separator)
    call = form.written([{"name": "tool_call_name", "arguments": "tool_call_arguments"}])
    return replace(
        form,
        instructions=_FOR_DEEPSEEK.format(call=call, several=several),
        described="### {name}\nDescription: {description}\n\nParameters: {parameters}\n",
    )


_SEP = "<\uff5ctool\u2581sep\uff5c>"
_DEEPSEEK = _deepseek(f"NAME{_SEP}", "", "", "follow each other without a separator")
_DEEPSEEK_3 = _deepseek(
    f"function{_SEP}NAME\n```json\n", "\n```", "\n", "are separated by a line break"
)

# For each format the texts by which a chat template shows that it is this one.
_FORMATS: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (
    # Qwen 3.5 and Qwen3-Coder, Nemotron 3, Step 3.5.
    (
        ("<tool_call>", "<function=", "<parameter="),
        ToolFormat(
            *("<tool_call>", "\n", f"<function=NAME{BEHIND_NAME}", "</function>"),
            "\n</tool_call>",
            notation="xml",
        ),
    ),
    # Qwen 2.5 and 3, Hermes, SmolLM3, Granite 4.
    (("<tool_call>",), _HERMES),
    (("<|start_header_id|>", '"parameters": '), ToolFormat("", "", _PARAMETERS, "}")),
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
    # Gemma 4.
    (
        ("<|tool_call>", "<tool_call|>"),
        ToolFormat(
            *("<|tool_call>", "", "call:NAME{", "}", "<tool_call|>"),
            notation="gemma",
            calls_in_template=True,
            results_in_call=True,
        ),
    ),
    # gpt-oss: a call ends the answer, by a token that no text has.
    (
        ("<|channel|>", "<|call|>"),
        ToolFormat(
            *("", "", "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>"),
            is_single=True,
            text_header="<|channel|>final<|message|>",
            calls_in_template=True,
        ),
    ),
    # DeepSeek V3 and R1, before V3.1, in templates that know of tools.
    ((_SEP, "```json"), replace(_DEEPSEEK_3, instructions="")),
    ((_SEP,), replace(_DEEPSEEK, instructions="")),
    # Mistral from version 11 of its format on: Ministral 3, Devstral 2, Mistral Large 3.
    (
        ("[TOOL_CALLS]", "[ARGS]"),
        ToolFormat("[TOOL_CALLS]", "", "NAME[ARGS]", calls_in_template=True),
    ),
    # Mistral before that: Nemo; 7B v0.3 and Small 3.1, which write a blank.
    (("[TOOL_CALLS][",), replace(_MISTRAL, opening="[")),
    (("[TOOL_CALLS]",), _MISTRAL),
)
# What stands in the same tags in other forms; GLM 4.5 has the last.
_OTHERS = ("<function=", "<arg_key>")
# Formats of models whose templates do not know of tools.
_TOLD: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (
    ((_SEP, "```json"), _DEEPSEEK_3),
    ((_SEP,), _DEEPSEEK),
    (
        ("<start_of_turn>",),
        replace(_GEMMA3, instructions=_FOR_GEMMA, result="```tool_output\n{}\n```"),
    ),
)


def tool_format(template: str) -> ToolFormat:
    """The format of calls that a Jinja chat template uses, or the default one."""
    rows = _FORMATS if re.search(r"\btools\b", template) else _TOLD
    found = (form for signs, form in rows if all(sign in template for sign in signs))
    form = next(found, DEFAULT_FORMAT)
    is_other = form.notation != "xml" and any(sign in template for sign in _OTHERS)
    return DEFAULT_FORMAT if is_other else form
