"""The formats in which models write their reasoning."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final


@dataclass(frozen=True)
class ReasoningFormat:
    """How a model writes reasoning.

    Attributes:
        sign: The text by which a template or a vocabulary shows that it is this format.
        opening: The text before the reasoning.
        closing: The text behind it.
        before_text: What stands between ``closing`` and the answer's text.
        turn: What begins a further message of the answer, where its text is one of its own.
        header: What begins the text of such a message; the model may add a word at its last token.
        call: What begins such a message that calls a tool, and is a part of the answer's text.
    """

    sign: str
    opening: str
    closing: str
    before_text: str = ""
    turn: str = ""
    header: str = ""
    call: str = ""

    @cached_property
    def begin(self) -> re.Pattern[str]:
        """Finds the header."""
        name, mark, rest = self.header.rpartition("<|")
        return re.compile(re.escape(name) + "[^<]*" * bool(mark) + re.escape(mark + rest))

    @cached_property
    def end(self) -> re.Pattern[str]:
        """Finds the end of the reasoning, with what stands there before the text."""
        call = f"|(?={re.escape(self.call)})" if self.call else ""
        return re.compile(f"{re.escape(self.closing + self.turn)}(?:{self.begin.pattern}{call})")

    @property
    def forced_end(self) -> str:
        """What ends unfinished reasoning so that the text can begin."""
        # Markers that are followed by an empty line stand on a line of their own.
        line = "\n" if self.before_text.startswith("\n") else ""
        return f"{line}{self.closing}{self.turn}{self.header}{self.before_text}"


FORMATS: Final = (
    # Qwen 3, DeepSeek R1 and V3.1, QwQ, SmolLM3, GLM 4.5, Phi 4 reasoning, Nemotron and others.
    ReasoningFormat("</think>", "<think>", "</think>", "\n\n"),
    # Mistral's Magistral and Ministral.
    ReasoningFormat("[/THINK]", "[THINK]", "[/THINK]"),
    # Gemma 4.
    ReasoningFormat("<channel|>", "<|channel>thought\n", "<channel|>"),
    ReasoningFormat("</seed:think>", "<seed:think>", "</seed:think>"),
    # gpt-oss: OpenAI's harmony has a channel for each kind of text.
    ReasoningFormat(
        "<|channel|>analysis",
        "<|channel|>analysis<|message|>",
        "<|end|>",
        turn="<|start|>assistant",
        header="<|channel|>final<|message|>",
        call="<|channel|>commentary to=",
    ),
)
"""A model has the first whose sign its template or its vocabulary has."""
