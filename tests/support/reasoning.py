"""An application whose model reasons: the echo engine, with the template of such a model.

The prompt opens the reasoning, so that a message "thought</think>text" is echoed as both.
"""

from msgspec import structs
from starlette.testclient import TestClient

from app.llm.tokenizer import PromptTokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def teach(client: TestClient, template: str = TEMPLATE) -> TestClient:
    """Let the served model have another chat template."""
    engine = client.app.state.services.engine  # type: ignore[attr-defined]
    engine.info = structs.replace(engine.info, chat_template=template)
    engine.tokenizer.close()
    engine.tokenizer = PromptTokenizer(engine.info)
    return client
