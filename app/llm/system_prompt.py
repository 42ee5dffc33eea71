"""The default system message, prompts/base_system.txt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from app.llm.tools import ChatMessage

_FILE = Path(__file__).parent / "prompts" / "base_system.txt"

SYSTEM_PROMPT: Final = _FILE.read_text(encoding="utf-8").strip()


def with_system_prompt(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """``messages`` with the default system message first, unless they start with one."""
    if messages and messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
