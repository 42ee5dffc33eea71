"""Token ids to text, piece by piece, and the stop strings that end an answer."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Decodes the tokens of one answer as they arrive.

    A character that spans several tokens is held back until it is complete, so no piece splits a
    character. Bytes of an incomplete character at the end of the answer are dropped.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def feed(self, token_ids: Sequence[int]) -> str:
        """Decode further tokens; returns the text that they complete."""
        return "".join(piece for token in token_ids if (piece := self._step(token)))

    def _step(self, token: int) -> str | None:
        try:
            return self._stream.step(self._tokenizer, token)
        except Exception:  # noqa: BLE001 - the library raises its own type from Rust
            # Some tokenizers decode a token differently once others follow it. The stream reports
            # that as an inconsistency and cannot be used any more, so a new one replaces it.
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._tokenizer, token)


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces.

    Text that may become a stop string is held back: at most one character less than the longest
    stop string has.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """Add a piece; returns the text to pass on, and whether a stop string ended it."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self._held = ""
            # The stop string that is complete first counts, so the cuts make no difference.
            return text[: min(found)[1]], True
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back; call this at the end of the answer."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
