"""Chat templates in the formats of well-known models, written anew and in short."""

from typing import Final

_EACH = "{% for m in messages %}"
_END = "{% endfor %}"
_ASK = "{% if add_generation_prompt %}"

CHATML = (
    f"{_EACH}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}<|im_end|>\n{_END}"
    f"{_ASK}<|im_start|>assistant\n{{% endif %}}"
)

# A tool's definition, a call and a result as Hermes has them; Qwen's are the same.
_TOOLS = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}"
    "# Tools\n\n<tools>{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}\n</tools>"
    '\n\nCall one so:\n<tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>'
    "<|im_end|>\n{% elif messages[0].role == 'system' %}"
    "<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
)
_CALLS = (
    "{% for call in m.tool_calls or [] %}{% if not loop.first or m.content %}{{ '\\n' }}{% endif %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}"
)
_RESULTS = (
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)
_THOUGHTS = (
    "{% set text = m.content or '' %}"
    "{% if '</think>' in text %}{% set text = text.split('</think>')[-1].lstrip('\\n') %}"
    "{% endif %}"
)
_QWEN = (
    "{TOOLS}{EACH}{% if m.role == 'tool' %}{RESULTS}"
    "{% elif m.role == 'assistant' %}{THOUGHTS}<|im_start|>assistant\n{{ TEXT }}{CALLS}<|im_end|>\n"
    "{% elif not (loop.first and m.role == 'system') %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _filled(thoughts: str, text: str) -> str:
    parts = {"{TOOLS}": _TOOLS, "{EACH}": _EACH, "{RESULTS}": _RESULTS, "{CALLS}": _CALLS}
    template = _QWEN
    for name, part in {**parts, "{THOUGHTS}": thoughts, "TEXT": text}.items():
        template = template.replace(name, part)
    return template


HERMES: Final = _filled("", "m.content or ''")
QWEN_THINKING: Final = _filled(_THOUGHTS, "text")

LLAMA3: Final = (
    "{{ bos_token }}{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
    "<|start_header_id|>system<|end_header_id|>\n\n{{ first | trim }}"
    '{% if tools %}\n\nCall with {"name": name, "parameters": {}}.\n\n'
    "{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}{% endif %}<|eot_id|>"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% elif m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{{ \'{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{ call.arguments | tojson }}}<|eot_id|>"
    "{% elif not (loop.first and m.role == 'system') %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endif %}{% endfor %}"
    f"{_ASK}<|start_header_id|>assistant<|end_header_id|>\n\n{{% endif %}}"
)

LLAMA2: Final = (
    "{% if messages[0].role == 'system' %}{% set chat = messages[1:] %}"
    "{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set chat = messages %}{% set system = '' %}{% endif %}"
    "{% for m in chat %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# The tools, and here the system message too, stand before the last question.
MISTRAL: Final = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}"
    "{% set chat = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set chat = messages %}{% endif %}"
    "{{ bos_token }}{% for m in chat %}{% if m.role == 'user' %}{% if loop.last and tools %}"
    "[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ (system if loop.last else '') + m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' }}"
    "{{ ', ' if not loop.last else ']' + eos_token }}{% endfor %}"
    "{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "[TOOL_RESULTS] {{ m.content }}, {{ m.tool_call_id }}[/TOOL_RESULTS]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)

# Nemo and Small 2409 write no blanks.
MISTRAL_NEMO: Final = MISTRAL.replace("[TOOL_CALLS] [", "[TOOL_CALLS][").replace(
    "[INST] ", "[INST]"
)
# The reasoning of its latest models is left out here.
MISTRAL_ARGS: Final = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "[SYSTEM_PROMPT]{{ messages[0].content }}[/SYSTEM_PROMPT]{% endif %}"
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{% set given = call.function.arguments %}"
    "{{ '[TOOL_CALLS]' + call.function.name + '[ARGS]' }}"
    "{{ given if given is string else given | tojson }}{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% endif %}{% endfor %}"
)

GEMMA: Final = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{{ m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    f"{_ASK}{{{{ '<start_of_turn>model\\n' }}}}{{% endif %}}"
)
GEMMA3: Final = (
    "{{ bos_token }}{% set chat, system = messages, '' %}{% if messages[0].role == 'system' %}"
    "{% set chat, system = messages[1:], messages[0].content + '\\n\\n' %}{% endif %}"
    "{% for m in chat %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ (system if loop.first else '') + m.content | trim }}<end_of_turn>\n{% endfor %}"
    f"{_ASK}<start_of_turn>model\n{{% endif %}}"
)

# The system message is left out without a word, as in its first version.
PHI3_EARLY: Final = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|user|>\\n' + m.content + '<|end|>\\n<|assistant|>\\n' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '<|end|>\\n' }}{% endif %}{% endfor %}"
)
PHI3: Final = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    f"{_ASK}{{{{ '<|assistant|>\\n' }}}}{{% else %}}{{{{ eos_token }}}}{{% endif %}}"
)
# The tools are a member of the system message, as JSON text.
PHI4_MINI: Final = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|system|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|><|end|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
    f"{_END}{_ASK}{{{{ '<|assistant|>' }}}}{{% else %}}{{{{ eos_token }}}}{{% endif %}}"
)
PHI4: Final = (
    f"{_EACH}<|im_start|>{{{{ m.role }}}}<|im_sep|>{{{{ m.content }}}}<|im_end|>{_END}"
    f"{_ASK}<|im_start|>assistant<|im_sep|>{{% endif %}}"
)
ZEPHYR: Final = (
    f"{_EACH}{{{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}}}{_END}"
    f"{_ASK}{{{{ '<|assistant|>\\n' }}}}{{% endif %}}"
)
VICUNA: Final = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}"
    "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    f"{_ASK}ASSISTANT:{{% endif %}}"
)
ALPACA: Final = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\\n\\n' }}"
    "{% elif m.role == 'user' %}{{ '### Instruction:\\n' + m.content + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + m.content + eos_token + '\\n\\n' }}{% endif %}{% endfor %}"
    f"{_ASK}{{{{ '### Response:\\n' }}}}{{% endif %}}"
)
# DeepSeek's tokens have wide bars.
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
DEEPSEEK: Final = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'assistant' %}"
    "{{ '" + ASSISTANT + "' + m.content.split('</think>')[-1] + eos_token }}"
    "{% else %}{{ '" + USER + "' + m.content }}{% endif %}{% endfor %}"
    f"{_ASK}{ASSISTANT}{{% endif %}}"
)
DEEPSEEK_CHAT: Final = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}"
    "{% else %}{{ m.content + '\\n\\n' }}{% endif %}{% endfor %}"
    f"{_ASK}Assistant:{{% endif %}}"
)
COMMAND_R: Final = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{% if m.role == 'user' %}<|USER_TOKEN|>{% elif m.role == 'assistant' %}<|CHATBOT_TOKEN|>"
    "{% else %}<|SYSTEM_TOKEN|>{% endif %}"
    "{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>{% endfor %}"
    f"{_ASK}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{{% endif %}}"
)
GRANITE: Final = (
    "{% if tools %}<|start_of_role|>tools<|end_of_role|>"
    "{{ tools | tojson(indent=4) }}<|end_of_text|>\n"
    f"{{% endif %}}{_EACH}<|start_of_role|>{{{{ m.role }}}}<|end_of_role|>{{{{ m.content }}}}"
    f"<|end_of_text|>\n{_END}{_ASK}<|start_of_role|>assistant<|end_of_role|>{{% endif %}}"
)
GRANITE3: Final = (
    "<|start_of_role|>system<|end_of_role|>You help.{% if tools %} Where a tool is required, "
    "respond only with <|tool_call|> followed by a JSON list of tools used.{% endif %}"
    "<|end_of_text|>\n" + GRANITE.replace("tools<|end", "available_tools<|end")
)
OPENCHAT: Final = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role != 'system' %}GPT4 Correct {{ m.role.title() }}: {% endif %}"
    "{{ m.content }}<|end_of_turn|>{% endfor %}"
    f"{_ASK}GPT4 Correct Assistant:{{% endif %}}"
)
SOLAR: Final = (
    "{% for m in messages %}### {{ m.role.title() }}:\n{{ m.content }}\n\n{% endfor %}"
    f"{_ASK}{{{{ '### Assistant:\\n' }}}}{{% endif %}}"
)
FALCON: Final = (
    "{% for m in messages %}{{ '\\n' if not loop.first else '' }}"
    "{{ m.role.title() + ': ' + m.content.strip() }}{% endfor %}"
    f"{_ASK}{{{{ '\\nAssistant:' }}}}{{% endif %}}"
)
OLMO: Final = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}"
    "{{ eos_token if m.role == 'assistant' else '' }}{{ '\\n' }}{% endfor %}"
    f"{_ASK}{{{{ '<|assistant|>\\n' }}}}{{% endif %}}"
)
GLM: Final = (
    f"[gMASK]<sop>{_EACH}{{{{ '<|' + m.role + '|>\\n' + m.content }}}}{_END}"
    f"{_ASK}<|assistant|>\n{{% endif %}}"
)
EXAONE: Final = (
    "{% if messages[0].role != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
    "{% for m in messages %}{{ '[|' + m.role + '|]' + m.content }}"
    "{{ '\\n' if m.role == 'user' else '[|endofturn|]\\n' }}{% endfor %}"
    f"{_ASK}[|assistant|]{{% endif %}}"
)
