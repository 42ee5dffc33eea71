"""Chat templates of models that reason, written anew and in short: how they frame reasoning."""

from dataclasses import dataclass
from typing import Final

from tests.data import call_templates

# Qwen 3 writes the reasoning of answers behind the last question, and none before it.
QWEN3: Final = (
    "{% set at = namespace(question=0) %}{% for m in messages %}"
    "{% if m.role == 'user' and '<tool_response>' not in m.content %}"
    "{% set at.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% if loop.index0 > at.question and (thought or loop.last) %}"
    "{{ '<think>\\n' ~ thought.strip('\\n') ~ '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content.split('</think>') | last }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
_CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# The thinking models of Qwen 3, QwQ and DeepSeek R1: the prompt opens the reasoning.
PREFILLED: Final = (
    _CHAT.replace("m.content }}", "m.content.split('</think>')[-1] }}")
    + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# DeepSeek V3.1 opens it, or has it ended, at the end of the prompt.
DEEPSEEK31: Final = (
    _CHAT + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think>' if thinking is defined and thinking else '</think>' }}{% endif %}"
)
MAGISTRAL: Final = (
    "{{ '[SYSTEM_PROMPT]First draft your thinking: [THINK]Thoughts.[/THINK]Answer.[/SYSTEM_PROMPT]'"
    " }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
GEMMA4: Final = (
    "{% if enable_thinking is defined and enable_thinking %}<|turn>system\n<|think|>\n<turn|>\n"
    "{% endif %}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content.split('<channel|>')[-1] | trim }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n"
    "{% if not enable_thinking | default(false) %}<|channel>thought\n<channel|>{% endif %}"
    "{% endif %}"
)
# gpt-oss: the levels are words of its system message.
GPT_OSS: Final = (
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}<|end|>"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
SEED: Final = (
    "{% for m in messages %}<seed:bos>{{ m.role }}\n{% if m.reasoning_content %}"
    "<seed:think>{{ m.reasoning_content }}</seed:think>{% endif %}{{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<seed:bos>assistant\n{% endif %}"
)


@dataclass(frozen=True, eq=False)
class Spoken:
    """How one model writes an answer with reasoning.

    Attributes:
        template: Its chat template.
        before: What it writes before the reasoning, and between it and the text.
        values: Variables of the template with which it reasons.
        special: Its special tokens, of those in its markers.
        plain: Its added tokens that are not special.
    """

    template: str
    before: tuple[str, str]
    values: dict[str, bool]
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()


_HARMONY: Final = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>")
_THINK: Final = ("<think>", "</think>")
_FINAL: Final = "<|channel|>final<|message|>"
SPOKEN: Final = {
    "qwen 3": Spoken(QWEN3, ("<think>\n", "\n</think>\n\n"), {}, plain=_THINK),
    "markers without tokens": Spoken(QWEN3, ("<think>\n", "\n</think>\n\n"), {}),
    "special markers": Spoken(QWEN3, ("<think>\n", "\n</think>\n\n"), {}, special=_THINK),
    "deepseek r1": Spoken(PREFILLED, ("", "\n</think>\n\n"), {}, plain=_THINK),
    "deepseek v3.1": Spoken(DEEPSEEK31, ("", "</think>"), {"thinking": True}, plain=_THINK),
    "magistral": Spoken(
        MAGISTRAL, ("[THINK]", "[/THINK]"), {}, special=("[THINK]", "[/THINK]", "[INST]", "[/INST]")
    ),
    "gemma 4": Spoken(
        GEMMA4,
        ("<|channel>thought\n", "\n<channel|>"),
        {"enable_thinking": True},
        special=("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"),
    ),
    "gpt-oss": Spoken(
        GPT_OSS,
        ("<|channel|>analysis<|message|>", f"<|end|><|start|>assistant{_FINAL}"),
        {},
        special=_HARMONY,
    ),
    "gpt-oss with tools": Spoken(
        call_templates.GPT_OSS,
        ("<|channel|>analysis<|message|>", f"<|end|><|start|>assistant{_FINAL}"),
        {},
        special=(*_HARMONY, "<|constrain|>", "<|call|>"),
    ),
    "seed": Spoken(
        SEED, ("<seed:think>", "</seed:think>"), {}, special=("<seed:think>", "</seed:think>")
    ),
}
