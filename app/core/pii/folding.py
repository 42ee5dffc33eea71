"""What the patterns see of a text: each character in its plainest form.

A full-width, mathematical or Arabic digit hides a number from patterns, and so does a character
without width. So patterns search a folded text; what is passed on is the text as it was written.
"""

import unicodedata

_MOST_KEPT = 8192
# Marks of notes stand behind a number or an address, and are not part of it.
_NOTE_MARKS = ("<super>", "<sub>")


class _Folded(dict[int, str]):
    """The folded character for a code point; an empty string where it is dropped."""

    def __missing__(self, point: int) -> str:
        folded = _fold(chr(point))
        if len(self) < _MOST_KEPT:
            self[point] = folded
        return folded


FOLDED = _Folded()
"""Folds by code point: NFKC where that is one character, digits of every script to ASCII; format
characters (Unicode's category Cf) are dropped."""


def _fold(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf":
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if unicodedata.decomposition(character).startswith(_NOTE_MARKS):
        return character
    normal = unicodedata.normalize("NFKC", character)
    return normal if len(normal) == 1 else character


def fold(text: str) -> str:
    """The text as the patterns see it."""
    return text if text.isascii() else text.translate(FOLDED)
