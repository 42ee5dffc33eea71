"""Removes control characters and template tokens from a model's text; stops at blocked patterns.

Each step gives the same result for a text in pieces, wherever it is cut, as for the whole text.
"""

import re
from collections.abc import Iterable

from app.core.pii.patterns import WINDOW, BoundedPattern, HoldBack

# C0 and C1 without tab, line feed and carriage return; the bidirectional embeddings, overrides and
# isolates, which reorder text on a screen (CVE-2021-42574, Unicode UAX #9); and surrogates. The
# marks U+200E, U+200F and U+061C stay, because Arabic and Hebrew need them.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
# Blocked patterns are searched in blocks: each call of RE2 costs the length of its whole argument.
_BLOCK = 256
# Characters before the searched text that a pattern's \b and (?m)^ look at.
_LEFT_CONTEXT = 1
_MAX_NESTED = 256


class OutputFilter:
    """The rules for a model's text; immutable, one for each served model.

    Args:
        template_tokens: The model's special tokens as text; blank ones are ignored.
        blocked_patterns: RE2 patterns that end an answer. A match has at most 256 characters: a
            longer one is not found.

    Raises:
        ValueError: The pattern that cannot be used, and why, in one line.
    """

    def __init__(
        self, template_tokens: Iterable[str] = (), blocked_patterns: Iterable[str] = ()
    ) -> None:
        self.tokens = _Tokens(template_tokens)
        self.patterns: list[BoundedPattern] = []
        for source in blocked_patterns:
            try:
                self.patterns.append(BoundedPattern(source))
            except ValueError as error:
                raise ValueError(f"blocked pattern {source[:80]!r}: {error}") from None
        self.hold_back = HoldBack((p.prefixes for p in self.patterns), WINDOW)


class _Tokens:
    """The tokens to remove, as an automaton of Aho and Corasick (1975).

    A state is the longest suffix of the text that is a prefix of a token.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        tokens = {t for text in texts if (t := _CONTROLS.sub("", text)).strip()}
        self.bound = max(_MAX_NESTED, *map(len, tokens)) if tokens else 0
        self._states = {token[:n] for token in tokens for n in range(len(token) + 1)} | {""}
        # The length of the longest token that a state ends with, or 0.
        self.removed: dict[str, int] = {}
        for state in self._states:
            ends = (state[n:] for n in range(len(state)))
            self.removed[state] = next((len(end) for end in ends if end in tokens), 0)
        starts = "".join(sorted({re.escape(token[0]) for token in tokens}))
        self.start = re.compile(f"[{starts}]" if tokens else "(?!)")

    def step(self, state: str, character: str) -> str:
        """The state after one more character."""
        state += character
        while state not in self._states:
            state = state[1:]
        return state


class StreamFilter:
    """Filters one text that comes in pieces; the joined results do not depend on the cuts.

    Tokens are removed character by character, and so are those that a removal creates
    ("<|e<|end|>nd|>"). The end of the text is held back as far as it consists of prefixes of
    tokens, or may begin a blocked pattern.
    """

    def __init__(self, rules: OutputFilter) -> None:
        self._tokens = rules.tokens
        # The characters held back, each with the automaton's state after it.
        self._held: list[tuple[str, str]] = []
        self._blocker = _Blocker(rules) if rules.patterns else None

    @property
    def blocked(self) -> bool:
        """Whether a blocked pattern has ended the text; all further results are empty then."""
        return self._blocker is not None and self._blocker.blocked

    @property
    def held(self) -> int:
        """Characters that are held back now."""
        return len(self._held) + (self._blocker.held if self._blocker else 0)

    def feed(self, piece: str) -> str:
        """Add a piece; the text that is decided by it."""
        if self.blocked:
            return ""
        piece = self._without_tokens(_CONTROLS.sub("", piece))
        return piece if self._blocker is None else self._blocker.feed(piece)

    def flush(self) -> str:
        """The text that is still held back, after the last piece."""
        if self.blocked:
            return ""
        rest = self._release(len(self._held))
        return rest if self._blocker is None else self._blocker.feed(rest) + self._blocker.flush()

    def _without_tokens(self, piece: str) -> str:
        tokens, held = self._tokens, self._held
        out: list[str] = []
        at = 0
        while at < len(piece):
            if not held:
                begin = tokens.start.search(piece, at)
                if begin is None:
                    out.append(piece[at:])
                    break
                out.append(piece[at : begin.start()])
                at = begin.start()
            state = tokens.step(held[-1][1] if held else "", piece[at])
            if removed := tokens.removed[state]:
                del held[len(held) + 1 - removed :]
            else:
                held.append((piece[at], state))
                # Prefixes nested in prefixes would otherwise be held back without a bound.
                out.append(self._release(len(held) - (tokens.bound if state else 0)))
            at += 1
        return "".join(out)

    def _release(self, count: int) -> str:
        count = max(0, count)
        released = "".join(character for character, _ in self._held[:count])
        del self._held[:count]
        return released


class _Blocker:
    """Ends a stream before the first match of a blocked pattern."""

    def __init__(self, rules: OutputFilter) -> None:
        self._patterns = rules.patterns
        self._hold_back = rules.hold_back
        self._text = ""
        self._at = 0
        self.blocked = False

    @property
    def held(self) -> int:
        return len(self._text) - self._at

    def feed(self, piece: str) -> str:
        out: list[str] = []
        for begin in range(0, len(piece), _BLOCK):
            self._text += piece[begin : begin + _BLOCK]
            out.append(self._pass_to(self._hold_back.cut(self._text, self._at)))
            if self.blocked:
                break
        return "".join(out)

    def flush(self) -> str:
        return "" if self.blocked else self._pass_to(len(self._text))

    def _pass_to(self, cut: int) -> str:
        """The text up to ``cut``, or up to the first match that begins before ``cut``."""
        text, at = self._text, self._at
        if cut <= at:
            return ""
        found = [span[0] for p in self._patterns if (span := p.first(text, at)) is not None]
        first = min(found, default=cut)
        if first < cut:
            self.blocked, cut = True, first
            self._text, self._at = "", 0
            return text[at:cut]
        kept = max(0, cut - _LEFT_CONTEXT)
        self._text, self._at = text[kept:], cut - kept
        return text[at:cut]
