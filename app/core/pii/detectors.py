"""Detectors of the built-in kinds of personal data.

RE2 finds candidates and :mod:`app.core.pii.checks` decides about them. A decision looks at no more
than ``LEFT_CONTEXT`` characters before a candidate and :data:`HOLD_BACK` after its beginning.
Texts are folded (:mod:`app.core.pii.folding`), so digits are ASCII and spaces are plain.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, get_args

from app.core.config import PiiKind
from app.core.pii.checks import (
    DASHES,
    bare_ssn_end,
    card_end,
    iban_end,
    ipv4_end,
    ipv6_end,
    ssn_end,
)
from app.core.pii.patterns import LinearPattern, prefixes_of
from app.core.pii.phones import NATIONAL, NationalNumbers, e164_end, nanp_end

KINDS: tuple[PiiKind, ...] = get_args(PiiKind)
"""The kinds, by priority where two entities have the same place and length."""

_MAX_LOCAL = 64
_MAX_DOMAIN = 255
HOLD_BACK = _MAX_LOCAL + 1 + _MAX_DOMAIN
"""Characters of the longest entity, an e-mail address (RFC 5321, section 4.5.3.1)."""

Span = tuple[int, int]

_GAP = rf"[{DASHES} .]"
_GAP_OR_BREAK = rf"[{DASHES} .\n]"


class Detector(NamedTuple):
    """Finds the entities of one kind.

    Attributes:
        kind: One of :data:`KINDS`, or a configured pattern's name.
        prefixes: RE2 source that matches every prefix of an entity; ``None`` where it is not known.
        first: Gets a text and a start; returns beginning and end of the leftmost entity that begins
            there or later.
    """

    kind: str
    prefixes: str | None
    first: Callable[[str, int], Span | None]


Check = Callable[[str, int, int], int | None]
"""Gets a text and a candidate's beginning and end; returns the entity's end, or ``None``."""


def _shape(kind: str, source: str, check: Check, *, runs: bool = False) -> Detector:
    """Finds candidates by a pattern and decides about them by a check.

    Args:
        kind: One of :data:`KINDS`.
        source: RE2 pattern of the longest candidate.
        check: Decides about a candidate.
        runs: Whether no entity can begin inside a rejected candidate, which is then skipped.
    """
    pattern = LinearPattern(source)

    def first(text: str, start: int) -> Span | None:
        while (span := pattern.search(text, start)) is not None:
            begin, end = span
            stop = check(text, begin, end)
            if stop is not None:
                return begin, stop
            start = end if runs else begin + 1
        return None

    # The checks look at a dot, a dash or a space after an entity, and at the character after that.
    return Detector(kind, prefixes_of(source + r"[.\- ]?"), first)


# E-mail addresses. The local part is a run of at most 64 letters, digits and ``._%+'-``. The domain
# has at most 255 characters and at least two labels. Letters are Latin, Greek and Cyrillic: scripts
# written without spaces are left out, because the sentence around an address would match too.
_LETTERS = r"\p{Latin}\p{Greek}\p{Cyrillic}\p{Mn}0-9"
_LOCAL_SOURCE = rf"[{_LETTERS}_][{_LETTERS}_.%+'\-]*"
_LOCAL = LinearPattern(rf"{_LOCAL_SOURCE}\z")
_DOMAIN = LinearPattern(rf"[{_LETTERS}][{_LETTERS}.\-]*")


def _first_email(text: str, start: int) -> Span | None:
    at = text.find("@", start + 1)
    while at >= 0:
        span = _email_around(text, start, at)
        if span is not None:
            return span
        at = text.find("@", at + 1)
    return None


def _email_around(text: str, start: int, at: int) -> Span | None:
    end = _domain_end(text, at + 1)
    if end is None:
        return None
    start = max(start, at - _MAX_LOCAL)
    dots = text.rfind("..", start, at)
    if dots >= 0:  # No address has two dots in a row (RFC 5321, dot-string).
        start = dots + 2
    local = _LOCAL.search(text[start:at])
    if local is None or _is_repository(text, at, end):
        return None
    return start + local[0], end


def _is_repository(text: str, at: int, end: int) -> bool:
    """Whether it is ``git@host:path``, whatever place the search began at."""
    if text[end : end + 1] != ":" or text[max(0, at - 3) : at] != "git":
        return False
    # The pattern must begin with a letter or digit, so one is put before the character.
    return at < 4 or _LOCAL.match(f"x{text[at - 4 : at]}") is None


def _domain_end(text: str, begin: int) -> int | None:
    # Rejects most at signs of a hostile input at little cost.
    if not text[begin : begin + 1].isalnum():
        return None
    found = _DOMAIN.match(text[begin : begin + _MAX_DOMAIN + 1])
    if found is None or found[1] > _MAX_DOMAIN:
        return None
    run_end = begin + found[1]
    # Matrix code calls methods: `a@b.transpose()`.
    if text[run_end : run_end + 1] == "(":
        return None
    labels = text[begin:run_end].split("..", maxsplit=1)[0].rstrip(".-").split(".")
    while labels and not _is_top_level(labels[-1]):
        labels.pop()
    if len(labels) < 2 or not all(map(_is_label, labels)):
        return None
    # name@1.2.3-rc.x is a package version, name@2x.png a picture for high-density screens.
    if labels[0].isdigit() and labels[1].isdigit():
        return None
    if len(labels) == 2 and labels[0] in ("2x", "3x"):
        return None
    return begin + sum(map(len, labels)) + len(labels) - 1


def _is_label(label: str) -> bool:
    return 0 < len(label) <= 63 and label[0] != "-" and label[-1] != "-"


def _is_top_level(label: str) -> bool:
    return len(label) >= 2 and (label.isalpha() or label.startswith("xn--"))


def built_in(regions: Iterable[str]) -> list[Detector]:
    """One or more detectors for each kind; the first ones win a place of the same length.

    Raises:
        ValueError: A region that is not known.
    """
    g, b = _GAP, _GAP_OR_BREAK
    national = NationalNumbers(regions)
    nanp = rf"(?:\+?1{g}?)?(?:\(\d{{3}}\){g}?|\d{{3}}{g})\d{{3}}{g}\d{{4}}"
    detectors = [
        Detector("email", rf"{_LOCAL_SOURCE}(?:@[{_LETTERS}.\-]*)?", _first_email),
        _shape("phone", rf"\+[1-9]\d{{0,2}}(?:{g}?\(\d{{1,4}}\))?(?:{g}?\d){{4,13}}", e164_end),
        _shape("ssn", rf"\b\d{{3}}{g}\d{{2}}{g}\d{{4}}\b", ssn_end),
        _shape("ssn", r"\b\d{9}\b", bare_ssn_end),
        _shape("card", r"\b\d{13,19}\b", card_end),
        _shape("card", rf"\b\d{{4,6}}(?:{b}\d{{3,7}}){{1,4}}(?:{b}\d{{1,3}})?\b", card_end),
        _shape("iban", rf"\b[A-Za-z]{{2}}\d{{2}}(?:{b}?[A-Za-z0-9]){{11,30}}", iban_end),
        _shape("ip", r"\b\d+(?:\.\d+){3,}", ipv4_end, runs=True),
        _shape(
            "ip",
            "(?:[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:.]+|::[0-9A-Fa-f][0-9A-Fa-f:.]*)",
            ipv6_end,
            runs=True,
        ),
        _shape("phone", NATIONAL, national.end),
    ]
    if national.north_american:
        detectors.insert(1, _shape("phone", nanp, nanp_end))
    return detectors
