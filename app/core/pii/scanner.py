"""Finds personal data in a text or a stream, and replaces it by the name of its kind.

At each place the longest entity wins, then the order of :data:`KINDS`, then that of the configured
patterns. Whether an entity begins at a place depends only on the :data:`LEFT_CONTEXT` characters
before it and the :data:`HOLD_BACK` after it, so a stream finds the same entities as a whole text.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from app.core.config import REGIONS, PiiKind
from app.core.pii.checks import LEFT_CONTEXT
from app.core.pii.detectors import HOLD_BACK, KINDS, Detector, built_in
from app.core.pii.folding import FOLDED, fold
from app.core.pii.patterns import BoundedPattern, HoldBack

# Each call of RE2 costs the length of its whole argument; blocks keep the total linear.
_BLOCK = 256
# Every built-in entity has a digit or an at sign, and most prose has neither.
_TRIGGER = re.compile("[0-9@]")
# Surrogates cannot be encoded, so RE2 would raise.
_SURROGATE = re.compile("[\ud800-\udfff]")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


class Entity(NamedTuple):
    """A piece of personal data: its kind, or its pattern's name, and its place ``[start, end)``."""

    kind: str
    start: int
    end: int


class PiiScanner:
    r"""Finds and replaces personal data; immutable, one for the whole service.

    Args:
        kinds: The built-in kinds to look for.
        custom: Pairs of a name and an RE2 pattern, which searches folded text. A match may begin
            and end inside a word unless the pattern says otherwise (``\b``), and has at most 256
            characters: a longer one is not found.
        regions: Countries whose national telephone numbers are looked for (ISO 3166-1).

    Raises:
        ValueError: The region, name or pattern that cannot be used, and why, in one line.
    """

    def __init__(
        self,
        kinds: Iterable[PiiKind] = KINDS,
        custom: Iterable[tuple[str, str]] = (),
        regions: Iterable[str] = REGIONS,
    ) -> None:
        wanted = set(kinds)
        self._built_in = [d for d in built_in(regions) if d.kind in wanted]
        self._custom = [_configured(name, source) for name, source in custom]
        names = [finder.kind.lower() for finder in self._custom]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"pii pattern name {name!r} is used twice")
        self.hold_back = HoldBack(
            (finder.prefixes for finder in (*self._built_in, *self._custom)), HOLD_BACK
        )

    def find(self, text: str) -> list[Entity]:
        """All entities, in the order of the text."""
        found: list[Entity] = []
        at = 0
        for part, kind in StreamRedactor(self).split(text, final=True):
            if kind is not None:
                found.append(Entity(kind, at, at + len(part)))
            at += len(part)
        return found

    def redact(self, text: str) -> tuple[str, Counter[str]]:
        """The text with each entity replaced, and the number of entities by kind."""
        stream = self.stream()
        return stream.feed(text) + stream.flush(), stream.counts

    def stream(self, before: str = "", counts: Counter[str] | None = None) -> "StreamRedactor":
        """A redactor for one text that comes in pieces; see :class:`StreamRedactor`."""
        return StreamRedactor(self, before, counts)

    def walk(self, text: str, start: int, cut: int) -> Iterator[Entity]:
        """The entities that begin in ``text[start:cut]``, left to right, without overlaps.

        The text has to be folded.
        """
        built_in = self._built_in if _TRIGGER.search(text, start) else []
        finders = [*built_in, *self._custom]
        heads = [finder.first(text, start) for finder in finders]
        while True:
            ranks = [
                (head[0], -head[1], order)
                for order, head in enumerate(heads)
                if head is not None and head[0] < cut
            ]
            if not ranks:
                return
            begin, negated_end, best = min(ranks)
            end = -negated_end
            yield Entity(finders[best].kind, begin, end)
            for order, head in enumerate(heads):
                if head is not None and head[0] < end:
                    heads[order] = finders[order].first(text, end)


def _configured(name: str, source: str) -> Detector:
    """The detector of a pattern from the configuration."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"pii pattern name {name[:40]!r}: 1 to 32 letters, digits, _ and -, a letter first"
        )
    if fold(source) != source:
        raise ValueError(
            f"pii pattern {name!r} cannot match: texts are folded, write {fold(source)[:80]!r}"
        )
    if name.lower() in KINDS:
        raise ValueError(f"pii pattern name {name!r} is a built-in kind")
    try:
        pattern = BoundedPattern(source)
    except ValueError as error:
        raise ValueError(f"pii pattern {name!r}: {error}") from None
    return Detector(name, pattern.prefixes, pattern.first)


class StreamRedactor:
    """Redacts one text that comes in pieces.

    The joined results are :meth:`PiiScanner.redact` of the whole text, wherever it is cut. Text is
    held back only while it can still become or extend an entity, at most :data:`HOLD_BACK`
    characters.

    Args:
        scanner: What to look for.
        before: Text before this one, which may say what a number is ("phone: ").
        counts: Counts the entities of several texts.

    Attributes:
        counts: Entities replaced so far, by kind.
    """

    def __init__(
        self, scanner: PiiScanner, before: str = "", counts: Counter[str] | None = None
    ) -> None:
        self._scanner = scanner
        # Undecided text, after up to LEFT_CONTEXT decided characters.
        self._text = fold(_SURROGATE.sub("\ufffd", before))[-LEFT_CONTEXT:]
        self._at = len(self._text)
        # How undecided characters were written that are folded, by their place in the text. The
        # first item is the character, the others those that are dropped behind it.
        self._written: dict[int, list[str]] = {}
        self.counts: Counter[str] = Counter() if counts is None else counts

    @property
    def held(self) -> int:
        """Characters that are held back now."""
        return len(self._text) - self._at

    def feed(self, piece: str) -> str:
        """Add a piece; the text that is decided by it, redacted."""
        return self._replace(self.split(piece))

    def flush(self) -> str:
        """The text that is still held back, redacted, after the last piece."""
        return self._replace(self.split("", final=True))

    def _replace(self, parts: Iterable[tuple[str, str | None]]) -> str:
        out: list[str] = []
        for text, kind in parts:
            if kind is None:
                out.append(text)
            else:
                self.counts[kind] += 1
                out.append(f"[{kind.upper().replace('_', '-')}]")
        return "".join(out)

    def split(self, piece: str, *, final: bool = False) -> Iterator[tuple[str, str | None]]:
        """Add a piece; the decided text in parts, each with its kind of entity or ``None``."""
        if not piece.isascii():
            piece = _SURROGATE.sub("\ufffd", piece)
        for begin in range(0, len(piece), _BLOCK):
            block = piece[begin : begin + _BLOCK]
            if block.isascii():
                self._text += block
            elif passed := self._add(block):
                yield passed, None
            yield from self._decide(final=False)
        if final:
            yield from self._decide(final=True)

    def _add(self, block: str) -> str:
        """Add folded text; returns dropped characters that no undecided character is before."""
        if block.translate(FOLDED) == block:
            self._text += block
            return ""
        passed = ""
        for character in block:
            plain = FOLDED[ord(character)]
            if plain:
                if plain != character:
                    self._written[len(self._text)] = [character]
                self._text += plain
            elif self.held:
                last = len(self._text) - 1
                self._written.setdefault(last, [self._text[last]]).append(character)
            else:
                passed += character
        return passed

    def _as_written(self, begin: int, end: int) -> str:
        """A part of the text as it came, with what was dropped behind each character."""
        written = self._written
        if not written:
            return self._text[begin:end]
        return "".join(
            "".join(written.get(place) or self._text[place]) for place in range(begin, end)
        )

    def _decide(self, *, final: bool) -> Iterator[tuple[str, str | None]]:
        text = self._text
        while True:
            cut = len(text) if final else self._scanner.hold_back.cut(text, self._at)
            if cut <= self._at:
                break
            for entity in self._scanner.walk(text, self._at, cut):
                yield self._as_written(self._at, entity.start), None
                # What is dropped behind an entity is not part of it.
                behind = "".join(self._written.get(entity.end - 1, [])[1:])
                yield self._as_written(entity.start, entity.end).removesuffix(behind), entity.kind
                yield behind, None
                self._at = entity.end
            if self._at <= cut:
                yield self._as_written(self._at, cut), None
                self._at = cut
                break
            # The last entity ends after the cut, so text behind it may be decided too.
        if self._at > LEFT_CONTEXT:
            cut = self._at - LEFT_CONTEXT
            self._text, self._at = text[cut:], LEFT_CONTEXT
            if self._written:
                self._written = {
                    place - cut: written
                    for place, written in self._written.items()
                    if place >= cut + LEFT_CONTEXT
                }
