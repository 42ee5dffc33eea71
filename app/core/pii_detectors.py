"""The built-in kinds of personal data: what each looks like, and what rules it out.

RE2 finds candidates, plain code checks them. Each decision looks at most :data:`LEFT_CONTEXT`
characters back and :data:`HOLD_BACK` ahead. Digits are ASCII; separators are too, apart from the
no-break spaces and the typographic hyphens that language models like to write.
"""

import ipaddress
from collections.abc import Callable, Iterator
from typing import Protocol

from app.core.pii_iban import IBAN_LENGTHS
from app.core.pii_patterns import LinearPattern, prefixes_of

KINDS = ("email", "phone", "ssn", "card", "iban", "ip")
"""In the order in which one wins over another of the same place and length."""

LEFT_CONTEXT = 32
"""Characters before an entity that may decide about it ("version 1.2.3.4")."""

_MAX_LOCAL = 64
_MAX_DOMAIN = 255
HOLD_BACK = _MAX_LOCAL + 1 + _MAX_DOMAIN
"""Length of the longest entity, an e-mail address: the limits of RFC 5321, section 4.5.3.1."""

# Space, no-break spaces and thin space; hyphen-minus, typographic hyphens and dashes.
_SPACES = " \u00a0\u2009\u202f"
_DASHES = "\\-\u2010\u2011\u2012\u2013"
_GAP = f"[{_SPACES}{_DASHES}]"
_GAP_OR_DOT = f"[{_SPACES}{_DASHES}.]"


class Detector(Protocol):
    """Finds the entities of one kind."""

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`."""
        ...

    @property
    def prefixes(self) -> str | None:
        """RE2 source of all that the text of an undecided entity may be so far."""
        ...

    def first(self, text: str, start: int) -> tuple[int, int] | None:
        """The leftmost entity that begins at ``start`` or after it."""
        ...


Check = Callable[[str, int, int], int | None]
"""Of a candidate: where the entity that begins where it begins ends, if there is one."""


class _Shape:
    """Candidates from a pattern, decided by a check."""

    def __init__(
        self, kind: str, source: str, check: Check, *, needs: str = "", runs: bool = False
    ) -> None:
        """Compile.

        Args:
            kind: One of :data:`KINDS`.
            source: RE2 pattern of the longest candidate.
            check: Decides about a candidate.
            needs: A string that no entity lacks, for a quick no.
            runs: Whether a refused candidate hides no other, so that all of it can be skipped.
        """
        self.kind = kind
        # The checks look two characters past an entity: at a dot or a dash, and what follows it.
        self.prefixes = prefixes_of(source + r"[.\-]?")
        self._pattern = LinearPattern(source)
        self._check = check
        self._needs = needs
        self._runs = runs

    def first(self, text: str, start: int) -> tuple[int, int] | None:
        if self._needs and text.find(self._needs, start) < 0:
            return None
        while (span := self._pattern.search(text, start)) is not None:
            begin, end = span
            stop = self._check(text, begin, end)
            if stop is not None:
                return begin, stop
            start = end if self._runs else begin + 1
        return None


class _Email:
    """Addresses, found from their at sign.

    The local part is a run of at most 64 letters, digits and ``._%+'-``, the domain one of at
    most 255 with two labels or more. Letters are Latin, Greek and Cyrillic: scripts written
    without spaces are left out, so that an address in a Chinese sentence does not swallow it.
    """

    kind = "email"

    _LETTERS = r"\p{Latin}\p{Greek}\p{Cyrillic}\p{Mn}0-9"
    prefixes: str | None = rf"[{_LETTERS}_][{_LETTERS}_.%+'\-]*(?:@[{_LETTERS}.\-]*)?"

    def __init__(self) -> None:
        letters = self._LETTERS
        self._local = LinearPattern(rf"[{letters}_][{letters}_.%+'\-]*\z")
        self._domain = LinearPattern(rf"[{letters}][{letters}.\-]*")

    def first(self, text: str, start: int) -> tuple[int, int] | None:
        at = text.find("@", start + 1)
        while at >= 0:
            span = self._around(text, start, at)
            if span is not None:
                return span
            at = text.find("@", at + 1)
        return None

    def _around(self, text: str, start: int, at: int) -> tuple[int, int] | None:
        end = self._domain_end(text, at + 1)
        if end is None:
            return None
        start = max(start, at - _MAX_LOCAL)
        dots = text.rfind("..", start, at)
        if dots >= 0:  # Two dots end a sentence; no address has them (RFC 5321, dot-string).
            start = dots + 2
        local = self._local.search(text[start:at])
        if local is None:
            return None
        begin = start + local[0]
        # git@host:path is an address of a repository, not of a person.
        if text[begin:at] == "git" and text[end : end + 1] == ":":
            return None
        return begin, end

    def _domain_end(self, text: str, begin: int) -> int | None:
        # A cheap no for the at signs of a hostile input.
        if not text[begin : begin + 1].isalnum():
            return None
        found = self._domain.match(text[begin : begin + _MAX_DOMAIN + 1])
        if found is None or found[1] > _MAX_DOMAIN:
            return None
        run_end = begin + found[1]
        # A method call, as in matrix code: `a@b.transpose()`.
        if text[run_end : run_end + 1] == "(":
            return None
        labels = text[begin:run_end].split("..", maxsplit=1)[0].rstrip(".-").split(".")
        while labels and not _is_top_level(labels[-1]):
            labels.pop()
        if len(labels) < 2 or not all(map(_is_label, labels)):
            return None
        # name@1.2.3-rc.x is a version of a package, name@2x.png a picture for dense screens.
        if labels[0].isdigit() and labels[1].isdigit():
            return None
        if len(labels) == 2 and labels[0] in ("2x", "3x"):
            return None
        return begin + sum(map(len, labels)) + len(labels) - 1


def _is_label(label: str) -> bool:
    return 0 < len(label) <= 63 and label[0] != "-" and label[-1] != "-"


def _is_top_level(label: str) -> bool:
    return len(label) >= 2 and (label.isalpha() or label.startswith("xn--"))


def _left_clear(text: str, begin: int) -> bool:
    """Whether a number can begin here: not inside a word, a longer number or a price."""
    before = text[begin - 1 : begin] if begin else ""
    if not before:
        return True
    if _is_word(before) or before in "+$\u20ac\u00a3\u00a5":
        return False
    further = text[begin - 2 : begin - 1] if begin > 1 else ""
    if before == ".":
        return not (further.isascii() and further.isdigit())
    return before not in "-\u2010\u2011" or not _is_word(further)


def _right_clear(text: str, end: int) -> bool:
    """Whether a number can end here: not inside a word or a longer number."""
    after, further = text[end : end + 1], text[end + 1 : end + 2]
    if _is_word(after):
        return False
    if after == ".":
        return not (further.isascii() and further.isdigit())
    return after != "-" or not _is_word(further)


def _is_word(character: str) -> bool:
    return character.isascii() and (character.isalnum() or character == "_")


_GAP_CHARACTERS = _SPACES + _DASHES.replace("\\", "") + ".()"
_WITHOUT_GAPS = {ord(c): None for c in _GAP_CHARACTERS}
_WITHOUT_DIGITS = {ord(c): None for c in "+0123456789"}


def _digits(text: str) -> str:
    """The digits of a candidate, which holds nothing else but gaps."""
    return text.translate(_WITHOUT_GAPS)


def _group_ends(body: str, counts: Container[int]) -> Iterator[tuple[int, str]]:
    """Where a group of digits ends such that one of ``counts`` stand before it, longest first."""
    for at in range(len(body), min(counts_floor, len(body)) - 1, -1):
        pass


# Issuer prefixes in ISO/IEC 7812 numbers: lowest, highest, and the lengths that are issued.
# After https://en.wikipedia.org/wiki/Payment_card_number#Issuer_identification_number_(IIN).
_ISSUERS: tuple[tuple[str, str, frozenset[int]], ...] = (
    ("4", "4", frozenset({13, 16, 19})),  # Visa
    ("51", "55", frozenset({16})),  # Mastercard
    ("2221", "2720", frozenset({16})),  # Mastercard
    ("34", "34", frozenset({15})),  # American Express
    ("37", "37", frozenset({15})),  # American Express
    ("300", "305", frozenset(range(14, 20))),  # Diners Club
    ("3095", "3095", frozenset(range(14, 20))),  # Diners Club
    ("36", "36", frozenset(range(14, 20))),  # Diners Club
    ("38", "39", frozenset(range(14, 20))),  # Diners Club
    ("6011", "6011", frozenset(range(16, 20))),  # Discover
    ("644", "659", frozenset(range(16, 20))),  # Discover, RuPay, Troy
    ("3528", "3589", frozenset(range(16, 20))),  # JCB
    ("60", "60", frozenset({16})),  # RuPay
    ("62", "62", frozenset(range(16, 20))),  # UnionPay
    ("81", "82", frozenset(range(16, 20))),  # UnionPay, RuPay
    ("2200", "2204", frozenset(range(16, 20))),  # Mir
    ("9792", "9792", frozenset({16})),  # Troy
    ("5018", "5018", frozenset(range(13, 20))),  # Maestro
    ("5020", "5020", frozenset(range(13, 20))),  # Maestro
    ("5038", "5038", frozenset(range(13, 20))),  # Maestro
    ("5893", "5893", frozenset(range(13, 20))),  # Maestro
    ("6304", "6304", frozenset(range(13, 20))),  # Maestro
    ("6759", "6763", frozenset(range(13, 20))),  # Maestro
)
_DOUBLED = (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)


def _is_card(number: str) -> bool:
    plausible = any(
        low <= number[: len(low)] <= high and len(number) in lengths
        for low, high, lengths in _ISSUERS
    )
    if not plausible:
        return False
    # Luhn's check, ISO/IEC 7812-1, annex B.
    total = sum(map(int, number[-1::-2])) + sum(_DOUBLED[int(d)] for d in number[-2::-2])
    return total % 10 == 0


def _card_end(text: str, begin: int, end: int) -> int | None:
    if not _left_clear(text, begin):
        return None
    for stop in _group_ends(text, begin, end):
        number = _digits(text[begin:stop])
        one_gap = len({c for c in text[begin:stop] if not c.isdigit()}) <= 1
        if one_gap and _is_card(number) and _right_clear(text, stop):
            return stop
    return None


def _ssn_end(text: str, begin: int, end: int) -> int | None:
    """Never issued: area 000, 666 and 900-999, group 00, serial 0000 (SSA, POMS RM 10201.035)."""
    number = _digits(text[begin:end])
    area, group, serial = number[:3], number[3:5], number[5:]
    if area in ("000", "666") or area[0] == "9" or group == "00" or serial == "0000":
        return None
    if text[begin + 3] != text[begin + 6]:
        return None
    return end if _left_clear(text, begin) and _right_clear(text, end) else None


def _nanp_end(text: str, begin: int, end: int) -> int | None:
    """Three, three and four digits.

    A real area code and exchange begin with 2 to 9 (NANPA), but people write 555-123-4567 and
    123-456-7890 for telephone numbers, so only numbers that gaps of spaces alone make out of
    any three numbers have to be strict.
    """
    number = _digits(text[begin:end])[-10:]
    area, exchange = number[:3], number[3:6]
    if area[0] == "0" or exchange[0] == "0" or area[1:] == "11":
        return None
    body = text[begin:end]
    plain = all(c.isdigit() or c in _SPACES for c in body)
    if plain and (area[0] == "1" or exchange[0] == "1"):
        return None
    return end if _left_clear(text, begin) and _right_clear(text, end) else None


def _e164_end(text: str, begin: int, end: int) -> int | None:
    """A plus sign and 8 to 15 digits, country code included (ITU-T E.164, section 6.2.1)."""
    if begin and (_is_word(text[begin - 1]) or text[begin - 1] == "+"):
        return None
    for stop in _group_ends(text, begin, end):
        number = _digits(text[begin:stop])
        # Country code 1 has a single length; elsewhere a second number may be taken along.
        fits = len(number) == 11 if number[0] == "1" else 8 <= len(number) <= 15
        if fits and _right_clear(text, stop):
            return stop
    return None


_PHONE_WORDS = LinearPattern(
    r"(?i)\b(?:phone|tel|telephone|mobile|cell|call|fax|text|sms|whatsapp|dial)"
    r"(?:\s+(?:number|no\.?|me|us|him|her|them|at|on|is))*[\s.:#=]*\z"
)
_SSN_WORDS = LinearPattern(r"(?i)\b(?:ssn|social\s+security)(?:\s+(?:number|no\.?|is))*[\s.:#=]*\z")
_VERSION_WORDS = LinearPattern(
    r"(?i)\b(?:v|ver|version|release|rev|revision|build|firmware|driver|kernel|sdk|section|sec|"
    r"chapter|clause|paragraph|oid)\.?\s*[:=]?\s*\z"
)


def _left_of(text: str, begin: int) -> str:
    return text[max(0, begin - LEFT_CONTEXT) : begin]


def _bare_phone_end(text: str, begin: int, end: int) -> int | None:
    """Ten digits without a gap are a telephone number only where a word says so."""
    if not (_left_clear(text, begin) and _right_clear(text, end)):
        return None
    return end if _PHONE_WORDS.search(_left_of(text, begin)) else None


def _bare_ssn_end(text: str, begin: int, end: int) -> int | None:
    """Nine digits without a gap are a social security number only where a word says so."""
    if not _SSN_WORDS.search(_left_of(text, begin)):
        return None
    number = text[begin:end]
    spaced = f"{number[:3]} {number[3:5]} {number[5:]}"
    issued = _ssn_end(spaced, 0, len(spaced)) is not None
    clear = _left_clear(text, begin) and _right_clear(text, end)
    return end if issued and clear else None


def _iban_end(text: str, begin: int, end: int) -> int | None:
    """The country's length, and remainder 1 modulo 97 (ISO 13616-1, ISO 7064)."""
    length = IBAN_LENGTHS.get(text[begin : begin + 2].upper())
    if length is None:
        return None
    taken: list[str] = []
    stop = begin
    while stop < end and len(taken) < length:
        if _is_word(text[stop]):
            taken.append(text[stop])
        stop += 1
    if len(taken) < length or _is_word(text[stop : stop + 1]):
        return None
    account = "".join(taken[4:] + taken[:4])
    return stop if int("".join(str(int(c, 36)) for c in account)) % 97 == 1 else None


def _ipv4_end(text: str, begin: int, end: int) -> int | None:
    if end - begin > 15 or not (_left_clear(text, begin) and _right_clear(text, end)):
        return None
    # Product/1.2.3.4 is a user agent's version; //1.2.3.4 is a host.
    if begin > 1 and text[begin - 1] == "/" and _is_word(text[begin - 2]):
        return None
    if begin and text[begin - 1] in "~^":
        return None
    try:
        ipaddress.IPv4Address(text[begin:end])
    except ValueError:
        return None
    return None if _VERSION_WORDS.search(_left_of(text, begin)) else end


_IPV6_CHARACTERS = frozenset("0123456789abcdefABCDEF:.")


def _ipv6_end(text: str, begin: int, end: int) -> int | None:
    before, further = text[max(0, begin - 1) : begin], text[max(0, begin - 2) : max(0, begin - 1)]
    if _is_word(before) or before == "." or (before == ":" and further in _IPV6_CHARACTERS):
        return None
    if _is_word(text[end : end + 1]):
        return None
    body = text[begin:end].rstrip(".")
    if body.endswith(":") and not body.endswith("::"):
        body = body[:-1]
    if len(body) > 45:  # The longest spelling, with an IPv4 address at its end.
        return None
    groups = [group for group in body.split(":") if group]
    # `[::2]` is a slice, `a::b` a scope, and eight pairs an EUI-64, far more often than not.
    if len(groups) < 3 and len(groups[0]) < 4:
        return None
    if len(groups) == 8 and all(len(group) == 2 for group in groups):
        return None
    if not any(c.isdigit() for c in body):
        return None
    try:
        ipaddress.IPv6Address(body)
    except ValueError:
        return None
    return begin + len(body)


def built_in() -> list[Detector]:
    """One detector or more for each of :data:`KINDS`, in their order."""
    g, d = _GAP, _GAP_OR_DOT
    return [
        _Email(),
        _Shape(
            "phone",
            rf"\+[1-9]\d{{0,2}}(?:{d}?\(\d{{1,4}}\))?(?:{d}?\d){{4,13}}",
            _e164_end,
            needs="+",
        ),
        _Shape(
            "phone", rf"(?:\+?1{d}?)?(?:\(\d{{3}}\){d}?|\d{{3}}{d})\d{{3}}{d}\d{{4}}", _nanp_end
        ),
        _Shape("phone", r"\b1?[2-9]\d{2}[2-9]\d{6}\b", _bare_phone_end),
        _Shape("ssn", rf"\b\d{{3}}{g}\d{{2}}{g}\d{{4}}\b", _ssn_end),
        _Shape("ssn", r"\b\d{9}\b", _bare_ssn_end),
        _Shape("card", r"\b\d{13,19}\b", _card_end),
        _Shape("card", rf"\b\d{{4,6}}(?:{g}\d{{3,7}}){{1,4}}(?:{g}\d{{1,3}})?\b", _card_end),
        _Shape(
            "iban",
            rf"\b(?:[A-Z]{{2}}\d{{2}}(?:{g}?[A-Z0-9]){{11,30}}|[A-Za-z]{{2}}\d{{2}}[A-Za-z0-9]{{11,30}})",
            _iban_end,
        ),
        _Shape("ip", r"\b\d+(?:\.\d+){3,}", _ipv4_end, needs=".", runs=True),
        _Shape(
            "ip",
            "(?:[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:.]+|::[0-9A-Fa-f][0-9A-Fa-f:.]*)",
            _ipv6_end,
            needs=":",
            runs=True,
        ),
    ]
