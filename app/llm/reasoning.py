"""Reasoning: what a model thinks before it answers, told apart from the answer's text.

A model writes it between two markers of its chat template, or in a channel of its own. The template
may have opened it already, at the end of the prompt.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from app.llm.detokenizer import overlap
from app.utils.errors import UnsupportedParameterError

# Variables by which templates switch reasoning on and off: Qwen's, and DeepSeek's and Granite's.
_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model writes reasoning.

    Attributes:
        sign: The text by which a template or a vocabulary shows that it is this format.
        opening: The text before the reasoning.
        closing: The text behind it.
        before_text: What stands between ``closing`` and the answer's text.
        without: What stands before the text of an answer without reasoning.
        channels: Whether the whole answer is in channels, as that of gpt-oss.
    """

    sign: str
    opening: str
    closing: str
    before_text: str = ""
    without: str = ""
    channels: bool = False

    @property
    def end(self) -> str:
        """What ends unfinished reasoning so that the text can begin."""
        # Models write the marker of several lines on a line of its own.
        line = "\n" if self.before_text.startswith("\n") else ""
        return f"{line}{self.closing}{self.before_text}"

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts that are no part of the answer, and that special tokens may spell."""
        return (self.opening, self.end, self.without)


_HARMONY_TEXT = "<|channel|>final<|message|>"
_FORMATS = (
    ReasoningFormat("</think>", "<think>", "</think>", "\n\n"),
    ReasoningFormat("[/THINK]", "[THINK]", "[/THINK]"),
    ReasoningFormat("<channel|>", "<|channel>thought\n", "<channel|>"),
    ReasoningFormat("</seed:think>", "<seed:think>", "</seed:think>"),
    ReasoningFormat("<|END_THINKING|>", "<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningFormat(
        "<|channel|>analysis",
        "<|channel|>analysis<|message|>",
        "<|end|>",
        f"<|start|>assistant{_HARMONY_TEXT}",
        _HARMONY_TEXT,
        channels=True,
    ),
)


def reasoning_format(template: str, added_tokens: Collection[str]) -> ReasoningFormat | None:
    """How a model writes reasoning, by its chat template or its added tokens; ``None``: not."""
    return next((f for f in _FORMATS if f.sign in template or f.sign in added_tokens), None)


def keeps_reasoning(template: str) -> bool:
    """Whether a chat template reads the reasoning of earlier answers, by either of its names."""
    return re.search(r"""reasoning_content|\.thinking\b|["']thinking["']""", template) is not None


class Splitter(ABC):
    """Splits the text of an answer, which comes in pieces, into reasoning and text.

    The results do not depend on where the text is cut.

    Attributes:
        inside: Whether the reasoning goes on.
        over: Whether it has ended, or the answer has begun without.
    """

    inside = over = False

    @abstractmethod
    def feed(self, piece: str) -> tuple[str, str]:
        """The reasoning and the text that a further piece completes."""

    @abstractmethod
    def flush(self) -> tuple[str, str]:
        """What was held back, once no more text comes."""

    @abstractmethod
    def begin_text(self) -> None:
        """What comes next is text; a part of a marker that was held back is dropped."""


class _Markers(Splitter):
    """Splits at two markers; the opening one counts at the beginning alone."""

    def __init__(self, form: ReasoningFormat, *, inside: bool) -> None:
        self._form = form
        self.inside = inside
        self._held = ""
        # White space on both sides of a marker is none of the reasoning's, nor of the text's.
        self._drop_space = inside

    def feed(self, piece: str) -> tuple[str, str]:
        self._held += piece
        reasoning = ""
        if not (self.inside or self.over):
            self._look_for_opening()
        if self.inside:
            reasoning = self._reason()
        return reasoning, self._text() if self.over else ""

    def _look_for_opening(self) -> None:
        begun, opening = self._held.lstrip(), self._form.opening
        if begun.startswith(opening):
            self._held = begun[len(opening) :]
            self.inside = self._drop_space = True
        elif not opening.startswith(begun):
            self.over = True

    def _reason(self) -> str:
        if self._drop_space:
            self._held = self._held.lstrip()
            self._drop_space = not self._held
        reasoning, closing, rest = self._held.partition(self._form.closing)
        if closing:
            self.inside, self.over, self._drop_space = False, True, True
            self._held = rest
            return reasoning.rstrip()
        keep = overlap(reasoning, self._form.closing)
        passed = reasoning[: len(reasoning) - keep].rstrip()
        self._held = reasoning[len(passed) :]
        return passed

    def _text(self) -> str:
        if self._drop_space:
            self._held = self._held.lstrip()
            self._drop_space = not self._held
        text, self._held = self._held, ""
        return text

    def flush(self) -> tuple[str, str]:
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self.inside else ("", held)

    def begin_text(self) -> None:
        self.inside, self.over, self._drop_space, self._held = False, True, True, ""


# What a channel's name and its body are between, by OpenAI's harmony format.
_BODY, _STARTS = "<|message|>", ("<|end|>", "<|start|>", "<|call|>", "<|return|>")


class _Channels(Splitter):
    """Splits by the channel of each message: what is in ``analysis`` is reasoning."""

    def __init__(self) -> None:
        self._in_header = True
        self._held = ""

    def feed(self, piece: str) -> tuple[str, str]:
        self._held += piece
        parts = ["", ""]
        while True:
            if self._in_header:
                header, found, rest = self._held.partition(_BODY)
                if not found:
                    break
                self._held, self._in_header = rest, False
                self.inside = "analysis" in header
                self.over = self.over or not self.inside
            ends = [(at, mark) for mark in _STARTS if (at := self._held.find(mark)) >= 0]
            at, mark = min(ends, default=(len(self._held), ""))
            if not mark:
                at -= max(overlap(self._held, start) for start in _STARTS)
            parts[not self.inside] += self._held[:at]
            self._held = self._held[at + len(mark) :]
            if not mark:
                break
            self._in_header, self.inside, self.over = True, False, True
        return parts[0], parts[1]

    def flush(self) -> tuple[str, str]:
        held, self._held = self._held, ""
        if self._in_header:
            return "", ""
        return (held, "") if self.inside else ("", held)

    def begin_text(self) -> None:
        self._in_header, self.inside, self.over, self._held = False, False, True, ""


class Thinking:
    """The reasoning of one answer, token by token.

    Args:
        form: How the model writes it.
        inside: Whether the prompt has opened it.
        budget: Most tokens of reasoning; ``None``: any number.
        gated: Whether the answer's text has a grammar, which must not hold for the reasoning.

    Attributes:
        tokens: How many tokens of reasoning there are.
        gated: Whether the grammar does not hold yet.
    """

    def __init__(
        self, form: ReasoningFormat, *, inside: bool, budget: int | None, gated: bool
    ) -> None:
        self._form = form
        self._splitter = _Channels() if form.channels else _Markers(form, inside=inside)
        self._budget = budget
        self.gated = gated
        self._reasoned = inside
        self.tokens = 0

    @property
    def inside(self) -> bool:
        """Whether the reasoning goes on."""
        return self._splitter.inside

    def add(self, text: str) -> tuple[str, str]:
        """The reasoning and the text that a further token completes, by the token's own text."""
        before = self.inside
        parts = self._splitter.feed(text)
        self._reasoned = self._reasoned or self.inside
        self.tokens += before and self.inside
        return parts

    def flush(self) -> tuple[str, str]:
        """The reasoning and the text that were held back, at the end of the answer."""
        return self._splitter.flush()

    @property
    def is_due(self) -> bool:
        """Whether the engine is to go on with another request, where the text begins.

        Either the budget is used up, or the grammar begins to hold.
        """
        if self.inside:
            return self._budget is not None and self.tokens >= self._budget
        return self.gated and self._splitter.over

    def turn(self) -> tuple[bool, str]:
        """Whether the tokens so far stay, and what follows them in the next request's prompt.

        Called once :attr:`is_due`. From now on all is text.
        """
        unfinished, form = self.inside, self._form
        self._splitter.begin_text()
        self._budget, self.gated = None, False
        if not self._reasoned:
            return False, form.without
        return True, form.end if unfinished else form.before_text


def template_values(
    given: Mapping[str, Any],
    effort: str | None,
    *,
    mentions: Callable[[str], bool],
    reasons: bool,
) -> tuple[dict[str, Any], int | None]:
    """What a template is told of a caller's wishes, and the budget of reasoning that they mean.

    Args:
        given: The caller's ``chat_template_kwargs``.
        effort: The caller's ``reasoning_effort``.
        mentions: Whether the template has a variable of a name.
        reasons: Whether the model has a format of reasoning.

    Raises:
        UnsupportedParameterError: The template has no such variable, or the model does not reason.
    """
    for name, value in given.items():
        asks_for_nothing = name in _SWITCHES and not value and not reasons
        if not mentions(name) and not asks_for_nothing:
            raise UnsupportedParameterError(
                f"chat_template_kwargs.{name}: the model's chat template has no such variable.",
                param=f"chat_template_kwargs.{name}",
            )
    values = {name: value for name, value in given.items() if mentions(name)}
    switch = next((name for name in _SWITCHES if mentions(name)), None)
    if effort is None or (effort == "none" and not reasons):
        return values, None
    if effort == "none":
        return ({switch: False, **values}, None) if switch else (values, 0)
    if mentions("reasoning_effort"):
        return {"reasoning_effort": effort, **values}, None
    if not reasons:
        raise UnsupportedParameterError(
            "reasoning_effort: the model does not reason.", param="reasoning_effort"
        )
    # A template without levels has reasoning on or off.
    return ({switch: True, **values} if switch else values), None
