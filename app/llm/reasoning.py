"""Reasoning: what a model thinks before it answers, told apart from the answer's text.

A model writes it between two markers of its chat template. The template may have opened it already,
at the end of the prompt.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from enum import Enum, auto
from typing import Any

from msgspec import structs

from app.llm.detokenizer import overlap
from app.llm.protocol import TokenEvent
from app.llm.reasoning_formats import FORMATS, ReasoningFormat
from app.utils.errors import UnsupportedParameterError

# Variables by which templates switch reasoning on and off: Qwen's, and DeepSeek's and Granite's.
_SWITCHES = ("enable_thinking", "thinking")
# Characters before the first marker, white space included; a marker has at most 60.
_MOST_HELD = 128
# What templates have already, and arguments of the function that renders them.
_RESERVED = {
    *("conversations", "messages", "tools", "documents", "chat_template"),
    *("raise_exception", "strftime_now"),
    *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
}
REASONING_MEMBERS = ("reasoning_content", "reasoning", "thinking")
"""Names by which templates read the reasoning of an earlier answer."""


class ModelReasoning:
    """What one model's chat template says of reasoning.

    Args:
        template: The chat template.
        added_tokens: The tokenizer's added tokens: for each text its id, and whether it is special.
        variables: Names that the template reads, but for those of special tokens.

    Attributes:
        form: How the model writes it; ``None`` where it does not reason.
        variables: Names of the template's variables that a caller may set.
        is_kept: Whether the template reads the reasoning of earlier answers.
    """

    def __init__(
        self,
        template: str,
        added_tokens: Mapping[str, tuple[int, bool]],
        variables: Collection[str],
    ) -> None:
        self.variables = set(variables) - _RESERVED
        signs = (f for f in FORMATS if f.sign in template or f.sign in added_tokens)
        self.form = next(signs, None)
        names = "|".join(REASONING_MEMBERS)
        self.is_kept = re.search(rf"""["'.]({names})\b""", template) is not None
        markers = self.form.opening + self.form.forced_end if self.form else ""
        # Decoding leaves out special tokens.
        self._marks = {
            token: text
            for text, (token, special) in added_tokens.items()
            if special and text in markers
        }

    def thinking(
        self, prompt: str, *, budget: int | None, gated: bool, with_calls: bool = False
    ) -> "Thinking | None":
        """Finds the reasoning in the answer to a chat; ``None`` where the prompt has ended it.

        For the other arguments see :class:`Thinking`.
        """
        form, end = self.form, prompt.rstrip()
        if form is None or end.endswith(form.closing):
            return None
        inside = end.endswith(form.opening.rstrip())
        text_header = ""
        if form.call and gated and with_calls:
            # The grammar chooses between the text and a call, and writes their headers.
            form, text_header = replace(form, header="", call=""), form.header
        elif not with_calls:
            form = replace(form, call="")
        return Thinking(
            form, self._marks, inside=inside, budget=budget, gated=gated, text_header=text_header
        )

    def values(
        self, given: Mapping[str, Any], effort: str | None
    ) -> tuple[dict[str, Any], int | None]:
        """What the template is told of a caller's wishes, and the budget that they come to.

        The wishes are ``chat_template_kwargs`` and ``reasoning_effort``.

        Raises:
            UnsupportedParameterError: The template has no such variable, or the model does not
                reason.
        """
        values = {name: value for name, value in given.items() if name in self.variables}
        for name in given.keys() - values.keys():
            # A model that does not reason need not be told so.
            if self.form or name not in _SWITCHES or given[name]:
                raise UnsupportedParameterError(
                    f"chat_template_kwargs.{name}: the model's chat template has no such variable.",
                    param=f"chat_template_kwargs.{name}",
                )
        switch = {name: effort != "none" for name in _SWITCHES if name in self.variables}
        if effort is None:
            return values, None
        if "reasoning_effort" in self.variables and effort != "none":
            return {"reasoning_effort": effort, **switch, **values}, None
        if self.form is None and not switch and effort != "none":
            raise UnsupportedParameterError(
                "reasoning_effort: the model does not reason.", param="reasoning_effort"
            )
        # A template without levels has reasoning on or off; without a switch it is ended at once.
        ends = effort == "none" and not switch and self.form is not None
        return {**switch, **values}, 0 if ends else None


class _State(Enum):
    """How far an answer has come."""

    BEGINNING = auto()
    REASONING = auto()
    BEHIND = auto()
    TEXT = auto()


class Thinking:
    """The reasoning of one answer, token by token, until its text begins.

    Args:
        form: How the model writes it.
        marks: Texts of special tokens in its markers, by their ids.
        inside: Whether the prompt has opened it.
        budget: Most tokens of reasoning; ``None``: any number.
        gated: Whether the answer's text has a grammar, which must not hold for the reasoning.
        text_header: What the next request's answer may begin with, and is no text.

    Attributes:
        tokens: How many tokens of reasoning there are.
        token_ids: The answer's tokens before its text: reasoning, markers and white space.
        gated: Whether the grammar does not hold yet.
        is_due: Whether the engine is to go on with another request, whose answer is text: the
            budget is used up, or the grammar begins to hold.
    """

    def __init__(
        self,
        form: ReasoningFormat,
        marks: Mapping[int, str],
        *,
        inside: bool,
        budget: int | None,
        gated: bool,
        text_header: str = "",
    ) -> None:
        self._form = form
        self._text_header = text_header
        self._marks = marks
        self._state = _State.REASONING if inside else _State.BEGINNING
        self._budget = budget
        self._held = self._last = ""
        self._is_new = self._has_marker = inside
        # Tokens of which it is not clear yet whether they are text, and their texts.
        self._unclear: tuple[TokenEvent, list[str]] | None = None
        # What follows the marker in its last token.
        self._rest = ""
        self.gated = gated
        self.tokens = 0
        self.token_ids: list[int] = []
        self.is_due = inside and budget == 0

    @property
    def is_over(self) -> bool:
        """Whether the reasoning has ended, or the answer has none."""
        return self._state in (_State.BEHIND, _State.TEXT)

    @property
    def has_text(self) -> bool:
        """Whether the text has begun: all further tokens are text."""
        return self._state is _State.TEXT

    def split(self, event: TokenEvent, texts: list[str]) -> tuple[str, TokenEvent, list[str]]:
        """The reasoning that an event completes, and what of the event is the answer's text.

        Tokens are left out from the one on at which the next request :attr:`is_due`. ``texts`` are
        what each token completes.
        """
        if self._unclear is not None:
            before, texts_before = self._unclear
            event, texts = _joined(before, event), [*texts_before, *texts]
            self._unclear, self._held = None, ""
        reasoning, before_text = "", list[int]()
        for token, text in zip(event.token_ids, texts, strict=True):
            was_inside = self._state is _State.REASONING
            reasoning += self._feed(self._marks.get(token, text), text)
            if self._state is _State.TEXT:
                break
            before_text.append(token)
            self.tokens += was_inside and self._state is _State.REASONING
            if self._is_due_now():
                break
        used = len(before_text)
        if event.finish_reason is not None and not self.is_due:
            reasoning += self._finish(event.finish_reason)
        if self._state is _State.BEGINNING and not self.is_due:
            self._unclear = event, texts
            return "", _rest_of(event, len(texts)), []
        if self._state is _State.TEXT and not self._has_marker:
            self.is_due = self.gated
            used = len(texts) if self.gated else 0
            return "", _rest_of(event, used), texts[used:]
        self.token_ids += before_text
        if self._state is _State.TEXT:
            texts = [*texts[:used], self._held, *texts[used + 1 :]]
            return reasoning, _rest_of(event, used), texts[used:]
        return reasoning, _rest_of(event, len(texts)), []

    def _feed(self, marked: str, text: str) -> str:
        if self._state is _State.BEHIND:
            self._begin_text(self._held + (marked if self._text_header else text))
            return ""
        self._held += marked
        self._last = marked
        if self._state is _State.BEGINNING:
            self._look_for_marker()
        return self._reason() if self._state is _State.REASONING else ""

    def _look_for_marker(self) -> None:
        begun, form = self._held.lstrip(), self._form
        if begun.startswith(form.opening):
            self._state, self._held = _State.REASONING, begun[len(form.opening) :]
            self._is_new = self._has_marker = True
        elif form.header and (header := form.begin.match(begun)):
            self._has_marker = True
            self._close(begun[header.end() :])
        elif (
            len(self._held) > _MOST_HELD
            or (form.call and begun.startswith(form.call))
            or not (
                any(marker.startswith(begun) for marker in (form.opening, form.header, form.call))
                or (form.header and begun.startswith(form.header.rpartition("<|")[0]))
            )
        ):
            self._state = _State.TEXT

    def _reason(self) -> str:
        # White space on both sides of a marker is none of the reasoning's, nor of the text's.
        if self._is_new:
            self._held = self._held.lstrip()
            self._is_new = not self._held
        held, form = self._held, self._form
        if end := form.end.search(held):
            self._close(held[end.end() :])
            return held[: end.start()].rstrip()
        # A header may follow the closing marker.
        at = held.rfind(form.closing)
        passed = held[: at if at >= 0 else len(held) - overlap(held, form.closing)].rstrip()
        self._held = held[len(passed) :]
        return passed

    def _close(self, rest: str) -> None:
        self._state, self._rest = _State.BEHIND, rest
        if not self.gated:
            self._begin_text(rest)

    def _begin_text(self, text: str) -> None:
        self._held, header = text.lstrip(), self._text_header
        if header and self._held.startswith(header):
            self._held, self._text_header = self._held[len(header) :].lstrip(), ""
        elif header and header.startswith(self._held):
            return
        if self._held:
            self._state = _State.TEXT

    def _is_due_now(self) -> bool:
        if self._state is _State.REASONING:
            self.is_due = self._budget is not None and self.tokens >= self._budget
        else:
            self.is_due = self.gated and self._state is _State.BEHIND
        return self.is_due

    def _finish(self, reason: str) -> str:
        """The engine is at the end before the text has begun; returns the reasoning held back."""
        if reason == "stop" and self._state is _State.REASONING:
            # The last token is the end of the turn.
            self.tokens -= 1
        if self.gated and reason == "stop":
            # The model has ended its turn without an answer that the grammar wants.
            self.is_due = True
        elif self._state is _State.BEGINNING:
            self._state = _State.TEXT
        return self._held.rstrip() if self._state is _State.REASONING else ""

    def turn(self, end_of_turn: Collection[int]) -> str:
        """What follows :attr:`token_ids` in the next request's prompt, whose answer is text.

        Called once :attr:`is_due`. ``end_of_turn`` are tokens that may have ended the answer.
        """
        form = self._form
        if self._state is _State.REASONING:
            behind = form.forced_end
            if self.token_ids and self.token_ids[-1] in end_of_turn - self._marks.keys():
                self.token_ids.pop()
        elif not self._has_marker:
            self.token_ids.clear()
            behind = form.header
        else:
            behind = form.before_text
            if self._rest:
                # The marker's last token holds more, which the text does not begin with.
                self.token_ids.pop()
                behind = self._last.removesuffix(self._rest) + behind
        self._state, self._held, self._unclear = _State.BEHIND, "", None
        self._budget, self.gated, self.is_due = None, False, False
        self._has_marker = True
        return behind


def _rest_of(event: TokenEvent, first: int) -> TokenEvent:
    """An event with its tokens from one on alone."""
    return structs.replace(
        event,
        token_ids=event.token_ids[first:],
        logprobs=event.logprobs[first:],
        top_logprobs=event.top_logprobs[first:],
    )


def _joined(before: TokenEvent, event: TokenEvent) -> TokenEvent:
    return structs.replace(
        event,
        token_ids=before.token_ids + event.token_ids,
        logprobs=before.logprobs + event.logprobs,
        top_logprobs=before.top_logprobs + event.top_logprobs,
    )
