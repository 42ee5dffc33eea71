"""Token ids to text, piece by piece, and the stop strings that end it."""

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Turns one answer's tokens into text as they come.

    A character that spans several tokens is held back until it is whole, so that no piece
    splits one. Bytes that never become a character (an answer cut off inside an emoji) are
    dropped.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""
        return "".join(piece for token in token_ids if (piece := self._step(token)))

    def _step(self, token: int) -> str | None:
        try:
            return self._stream.step(self._tokenizer, token)
        except Exception:  # noqa: BLE001 - the library raises its own type from Rust
            # Some tokenizers decode a token differently once others follow it, which the stream
            # takes for an inconsistency and from then on refuses; a fresh one goes on.
            self._stream = DecodeStream(skip_special_tokens=True)
            return self._stream.step(self._tokenizer, token)


class StopMatcher:
    """Finds the first stop string in a text that comes in pieces.

    Text that may still become a stop string is held back: at most as many characters as the
    longest one has, less one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """What may be passed on, and whether a stop string ended the text before the rest."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self._held = ""
            # Generating ends with the first that is complete, however the pieces fall.
            return text[: min(found)[1]], True
        keep = max(overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
