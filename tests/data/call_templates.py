"""Chat templates of models whose calls have forms of their own, written anew and in short."""

from typing import Final

_ASK = "{% if add_generation_prompt %}"

# Each argument stands on lines of its own; text but for strings is JSON.
QWEN35: Final = (
    "{% if tools %}<|im_start|>system\n# Tools\n\n<tools>"
    "{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}\n</tools>\n\nCall so:\n"
    "<tool_call>\n<function=a_function>\n<parameter=a_parameter>\na value\n</parameter>\n"
    "</function>\n</tool_call>"
    "{% if messages[0].role == 'system' %}{{ '\\n\\n' + messages[0].content }}{% endif %}"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% set text = m.content | trim %}{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
    "<|im_start|>assistant\n<think>\n{{ thought }}\n</think>\n\n{{ text }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ '\\n\\n' if loop.first and text else '\\n' if not loop.first else '' }}"
    "<tool_call>\n<function={{ call.function.name }}>\n"
    "{% for name, value in call.function.arguments | items %}<parameter={{ name }}>\n"
    "{{ value if value is string else value | tojson }}\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ text }}\n</tool_response>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif m.role != 'system' or not tools %}<|im_start|>{{ m.role }}\n{{ text }}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    f"{_ASK}<|im_start|>assistant\n"
    "{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n' }}{% endif %}"
)

# DeepSeek's tokens have wide bars, and low blocks in place of blanks.
_TOKEN = "<\uff5c{}\uff5c>"
USER, ASSISTANT = _TOKEN.format("User"), _TOKEN.format("Assistant")
CALL_TOKENS: Final = tuple(
    _TOKEN.format(f"tool\u2581{name}")
    for name in ("calls\u2581begin", "calls\u2581end", "call\u2581begin", "call\u2581end", "sep")
)
_CALLS, _CALLED, _CALL, _END, _SEP = CALL_TOKENS
_OUT, _OUTPUT = (_TOKEN.format(f"tool\u2581output{s}\u2581begin") for s in ("s", ""))
_OUT_END, _OUTPUT_END = (t.replace("begin", "end") for t in (_OUT, _OUTPUT))


def _deepseek(before: str, call: str, results: tuple[str, str, str]) -> str:
    return (
        "{% set at = namespace(result=false) %}{{ bos_token }}"
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '" + USER + "' + m.content }}"
        "{% elif m.role == 'assistant' %}{{ '' if at.result else '" + before + "' }}"
        "{{ '" + results[2] + "' if at.result else '' }}{{ m.content.split('</think>')[-1] }}"
        "{% for call in m.tool_calls or [] %}{{ '" + _CALLS + "' if loop.first else '' }}"
        "{{ '" + call + "' }}{% endfor %}<|im_end|>"
        "{% elif m.role == 'tool' %}{{ '' if at.result else '" + results[0] + "' }}"
        "{{ '" + results[1] + "' + m.content + '" + _OUTPUT_END + "' }}{% endif %}"
        "{% if m.role != 'system' %}{% set at.result = m.role == 'tool' %}{% endif %}{% endfor %}"
        "{{ '" + results[2] + "' if at.result else '" + before + "' }}"
    )


# Neither knows of tools; here a call from tool_calls is left out, as it comes as text.
DEEPSEEK31: Final = _deepseek(ASSISTANT + "</think>", _CALL + _SEP + _END, ("", _OUTPUT, ""))
DEEPSEEK_R1: Final = _deepseek(
    ASSISTANT, _CALL + "function" + _SEP + "\\n```json\\n```" + _END, (_OUT, _OUTPUT, _OUT_END)
)

# Strings stand between tokens, names have no quotes, and results are a part of the call's turn.
GEMMA4: Final = (
    "{% macro write(value) %}"
    "{% if value is string %}{{ '<|\"|>' + value + '<|\"|>' }}"
    "{% elif value is boolean %}{{ 'true' if value else 'false' }}"
    "{% elif value is mapping %}{{ '{' }}{{ members(value) }}{{ '}' }}"
    "{% elif value is sequence %}{{ '[' }}{% for item in value %}"
    "{{ write(item) }}{{ ',' if not loop.last }}{% endfor %}{{ ']' }}"
    "{% else %}{{ value }}{% endif %}{% endmacro %}"
    "{% macro members(value) %}{% for name, member in value | dictsort %}"
    "{{ name + ':' + write(member) }}{{ ',' if not loop.last }}{% endfor %}{% endmacro %}"
    "{% set at = namespace(result=false) %}{{ bos_token }}"
    "{% if messages[0].role == 'system' or tools %}<|turn>system\n"
    "{{ '<|think|>\\n' if enable_thinking }}"
    "{{ messages[0].content | trim if messages[0].role == 'system' }}"
    "{% for tool in tools or [] %}<|tool>declaration:{{ tool.function.name }}"
    "{{ write(tool.function.parameters) }}<tool|>{% endfor %}<turn|>\n{% endif %}"
    "{% for m in messages %}{% if m.role != 'system' %}"
    "{% if not at.result %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% endif %}"
    "{% for call in m.tool_calls or [] %}"
    "<|tool_call>call:{{ call.function.name }}{{ '{' + members(call.function.arguments) + '}' }}"
    "<tool_call|>{% endfor %}"
    "{% for result in m.tool_responses or [] %}<|tool_response>response:{{ result.name }}"
    "{{ '{value:' + write(result.response) + '}' }}<tool_response|>{% endfor %}"
    "{{ m.content.split('<channel|>')[-1] | trim }}"
    "{% set at.result = m.tool_responses and not m.content %}"
    "{{ '<turn|>\\n' if not at.result }}{% endif %}{% endfor %}"
    f"{_ASK}{{{{ '<|turn>model\\n' if not at.result }}}}"
    "{{ '<|channel>thought\\n<channel|>' if not enable_thinking }}{% endif %}"
)

# A message has one call, and a result is told with the name of the last one.
GPT_OSS: Final = (
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}"
    "{{ '\\nCalls go to the commentary channel.' if tools }}<|end|>"
    "{% if messages[0].role == 'system' or tools %}<|start|>developer<|message|>"
    "{{ messages[0].content if messages[0].role == 'system' }}"
    "{% if tools %}\n\nnamespace functions {\n{% for tool in tools %}"
    "{{ '// ' + tool.function.description }}\ntype {{ tool.function.name }} = (_: "
    "{{ tool.function.parameters | tojson }}) => any;\n{% endfor %}}{% endif %}<|end|>{% endif %}"
    "{% set at = namespace(name=none) %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}{% set at.name = call.name %}"
    "{% if m.content and m.thinking %}{{ raise_exception('one of the two') }}{% endif %}"
    "{% if m.content or m.thinking %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.content or m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>"
    "{{ call.arguments | tojson }}<|call|>{% else %}{% set at.name = none %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% elif m.role == 'tool' %}"
    "{% if at.name is none %}{{ raise_exception('no call before this result') }}{% endif %}"
    "<|start|>functions.{{ at.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>"
    "{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}"
    f"{_ASK}<|start|>assistant{{% endif %}}"
)
