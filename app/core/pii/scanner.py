"""Finds personal data in a text or a stream, and replaces it by the name of its kind.

The text is read from left to right. At each place the longest entity wins, then the order of
:data:`KINDS`, then that of the configured patterns; reading continues after the entity. Whether an
entity begins at a place depends only on the :data:`LEFT_CONTEXT` characters before it and the
:data:`HOLD_BACK` characters after it, so a stream that keeps those finds the same entities as the
whole text. A whole text is read as a stream, in blocks.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from app.core.pii.checks import LEFT_CONTEXT
from app.core.pii.detectors import HOLD_BACK, KINDS, Detector, built_in
from app.core.pii.patterns import BoundedPattern, HoldBack

# Each call of RE2 costs the length of its whole argument; blocks keep the total linear.
_BLOCK = 256
# Every built-in entity has a digit or an at sign, and most prose has neither.
_TRIGGER = re.compile("[0-9@]")
# Surrogates cannot be encoded, so RE2 would raise.
_SURROGATE = re.compile("[\ud800-\udfff]")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True)
class Entity:
    """A piece of personal data.

    Attributes:
        kind: One of :data:`KINDS`, or a configured pattern's name.
        start: Index of its first character.
        end: Index after its last one.
    """

    kind: str
    start: int
    end: int


class _Custom:
    """A pattern from the configuration."""

    def __init__(self, name: str, source: str) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"pii pattern name {name[:40]!r}: 1 to 32 letters, digits, _ and -, a letter first"
            )
        if name.lower() in KINDS:
            raise ValueError(f"pii pattern name {name!r} is a built-in kind")
        try:
            self._pattern = BoundedPattern(source)
        except ValueError as error:
            raise ValueError(f"pii pattern {name!r}: {error}") from None
        self.kind = name
        self.prefixes = self._pattern.prefixes
        self.first = self._pattern.first


class PiiScanner:
    r"""Finds and replaces personal data; immutable, one for the whole service.

    Args:
        kinds: The built-in kinds to look for.
        custom: Pairs of a name and an RE2 pattern. A match may begin and end inside a word unless
            the pattern says otherwise (``\b``), and has at most 256 characters: a longer one is
            not found.

    Raises:
        ValueError: The kind, name or pattern that cannot be used, and why, in one line.
    """

    def __init__(
        self, kinds: Iterable[str] = KINDS, custom: Iterable[tuple[str, str]] = ()
    ) -> None:
        wanted = set(kinds)
        unknown = sorted(wanted - set(KINDS))
        if unknown:
            raise ValueError(f"pii kind {unknown[0]!r} is not one of {', '.join(KINDS)}")
        self._built_in: list[Detector] = [d for d in built_in() if d.kind in wanted]
        self._custom: list[Detector] = [_Custom(name, source) for name, source in custom]
        names = [finder.kind.lower() for finder in self._custom]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"pii pattern name {name!r} is used twice")
        finders = [*self._built_in, *self._custom]
        self.hold_back = HoldBack((f.prefixes for f in finders), HOLD_BACK)

    def find(self, text: str) -> list[Entity]:
        """All entities, in the order of the text."""
        reader = _Reader(self)
        return [entity for _, entity in reader.read_all(text) if entity is not None]

    def redact(self, text: str) -> tuple[str, Counter[str]]:
        """The text with each entity replaced, and the number of entities by kind."""
        stream = self.stream()
        return stream.feed(text) + stream.flush(), stream.counts

    def stream(self) -> "StreamRedactor":
        """A redactor for one text that comes in pieces."""
        return StreamRedactor(self)

    def walk(self, text: str, start: int, cut: int) -> Iterator[Entity]:
        """The entities that begin in ``text[start:cut]``, left to right, without overlaps."""
        triggered = _TRIGGER.search(text, start) is not None
        finders: Sequence[Detector] = (
            [*self._built_in, *self._custom] if triggered else self._custom
        )
        heads = [finder.first(text, start) for finder in finders]
        while True:
            best: tuple[int, int, int] | None = None
            for order, head in enumerate(heads):
                if head is not None and head[0] < cut:
                    rank = (head[0], -head[1], order)
                    best = rank if best is None or rank < best else best
            if best is None:
                return
            begin, end = best[0], -best[1]
            yield Entity(finders[best[2]].kind, begin, end)
            for order, head in enumerate(heads):
                if head is not None and head[0] < end:
                    heads[order] = finders[order].first(text, end)


class StreamRedactor:
    """Redacts one text that comes in pieces.

    The joined results are :meth:`PiiScanner.redact` of the whole text, wherever it is cut. Text is
    held back only while it can still become or extend an entity, at most :data:`HOLD_BACK`
    characters.

    Attributes:
        counts: Entities replaced so far, by kind.
    """

    def __init__(self, scanner: PiiScanner) -> None:
        self._reader = _Reader(scanner)
        self.counts: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """Characters that are held back now."""
        return self._reader.held

    def feed(self, piece: str) -> str:
        """Add a piece; the text that is decided by it, redacted."""
        return self._replace(self._reader.read(piece))

    def flush(self) -> str:
        """The text that is still held back, redacted, after the last piece."""
        return self._replace(self._reader.finish())

    def _replace(self, parts: Iterable[tuple[str, Entity | None]]) -> str:
        out: list[str] = []
        for text, entity in parts:
            if entity is None:
                out.append(text)
            else:
                self.counts[entity.kind] += 1
                out.append(f"[{entity.kind.upper().replace('_', '-')}]")
        return "".join(out)


class _Reader:
    """Splits a text that comes in pieces into plain parts and entities."""

    def __init__(self, scanner: PiiScanner) -> None:
        self._scanner = scanner
        self._text = ""  # Undecided text, after up to LEFT_CONTEXT decided characters.
        self._at = 0
        self._offset = 0  # Of _text in the whole text.

    @property
    def held(self) -> int:
        return len(self._text) - self._at

    def read_all(self, text: str) -> Iterator[tuple[str, Entity | None]]:
        yield from self.read(text)
        yield from self.finish()

    def read(self, piece: str) -> Iterator[tuple[str, Entity | None]]:
        if not piece.isascii():
            piece = _SURROGATE.sub("\ufffd", piece)
        for begin in range(0, len(piece), _BLOCK):
            self._text += piece[begin : begin + _BLOCK]
            yield from self._decide(final=False)

    def finish(self) -> Iterator[tuple[str, Entity | None]]:
        yield from self._decide(final=True)

    def _decide(self, *, final: bool) -> Iterator[tuple[str, Entity | None]]:
        text = self._text
        while True:
            cut = len(text) if final else self._scanner.hold_back.cut(text, self._at)
            if cut <= self._at:
                break
            for entity in self._scanner.walk(text, self._at, cut):
                yield text[self._at : entity.start], None
                shifted = Entity(
                    entity.kind, entity.start + self._offset, entity.end + self._offset
                )
                yield text[entity.start : entity.end], shifted
                self._at = entity.end
            if self._at <= cut:
                yield text[self._at : cut], None
                self._at = cut
                break
            # The last entity ends after the cut, so text behind it may be decided too.
        if self._at > LEFT_CONTEXT:
            dropped = self._at - LEFT_CONTEXT
            self._text, self._at = text[dropped:], LEFT_CONTEXT
            self._offset += dropped
