"""The texts of the tokens that frame turns, which a caller's text may spell and never become."""

import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import AddedToken


class Spellings:
    """The tokens that frame turns, and marks that nobody can write.

    Attributes:
        special: The ids of special tokens by their texts.
        framing: These, and those of other tokens that the template spells.
        pattern: Finds the text of a framing token.
        names: Marks by which the encoder knows framing tokens, by their texts.
    """

    def __init__(self, added: Mapping[int, AddedToken], template: str) -> None:
        self.special = {token.content: i for i, token in added.items() if token.special}
        # White space and signs are no frame of a turn: Gemma has tokens for runs of line breaks.
        plain = {
            token.content: token_id
            for token_id, token in added.items()
            if not token.special
            and token.content in template
            and any(map(str.isalnum, token.content))
        }
        self.framing = {**self.special, **plain}
        self._special = _any_of(map(re.escape, self.special))
        self.pattern = _any_of(map(re.escape, self.framing))
        # A caller cannot write a placeholder, because nobody can guess the nonce in it.
        self._nonce = secrets.token_hex(8)
        self._placeholder = self.marked(r":(\d+)")
        self.names = {text: self.mark(f"={i}") for text, i in self.framing.items()}
        self._added = {token_id: token.content for token_id, token in added.items()}

    def mark(self, what: str) -> str:
        """A text that no caller can write."""
        return f"\ue000{self._nonce}{what}\ue001"

    def marked(self, pattern: str) -> re.Pattern[str]:
        """Finds the marks whose contents match a regular expression."""
        return re.compile(self.mark(pattern), re.DOTALL)

    def named(self, text: str) -> str:
        """A text of ours, in which what spells a framing token is that token."""
        return self.pattern.sub(lambda m: self.names[m[0]], text)

    def escape(self, text: str, *, is_answer: bool = False) -> str:
        """A text with marks in place of what spells a framing token.

        A template may look for a token that is not special in an answer, as for the end of its
        reasoning.
        """
        pattern = self._special if is_answer else self.pattern
        return pattern.sub(lambda m: self.mark(f":{self.framing[m.group()]}"), text)

    def escape_within(self, value: Any) -> Any:
        """A JSON value with every string in it escaped, names of members included."""
        if isinstance(value, str):
            return self.escape(value)
        if isinstance(value, Mapping):
            return {self.escape_within(k): self.escape_within(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.escape_within(v) for v in value]
        return value

    def restore(self, text: str) -> str:
        """A text without the marks of :meth:`escape`."""
        return self._placeholder.sub(lambda m: self._added[int(m[1])], text)


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    # Longest first, so that a token is found before the tokens that it contains.
    return re.compile("|".join(sorted(patterns, key=len, reverse=True)) or "(?!)")
