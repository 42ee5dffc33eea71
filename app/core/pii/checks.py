"""Checks that decide whether a candidate is personal data.

Each check gets a text and the beginning and end of a candidate in it. It returns the end of the
entity at that beginning, or ``None`` when there is none. It looks at no more than
:data:`LEFT_CONTEXT` characters before the candidate and two after it.
"""

import ipaddress
import re
from collections import defaultdict
from collections.abc import Iterable

from app.core.pii.patterns import LinearPattern

LEFT_CONTEXT = 32
"""Characters before an entity that a check may look at ("version 1.2.3.4")."""

DASHES = "-\u2010\u2012\u2013"
"""Hyphen-minus, and the typographic dashes that language models often write between digits."""

# Country code and length, from SWIFT's IBAN registry (ISO 13616).
_IBANS = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 "
    "DK18 DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 "
    "IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 "
    "MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24 "
    "SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30"
)
IBAN_LENGTHS: dict[str, int] = {entry[:2]: int(entry[2:]) for entry in _IBANS.split()}
"""Length of an IBAN by country code."""


def is_left_clear(text: str, begin: int) -> bool:
    """Whether a number can begin at ``begin``: not inside a word, a longer number or a price."""
    if not begin:
        return True
    before = text[begin - 1]
    if is_word(before) or before in "+$\u20ac\u00a3\u00a5":
        return False
    further = text[begin - 2 : begin - 1] if begin > 1 else ""
    if before == ".":
        return not (further.isascii() and further.isdigit())
    return before not in "-\u2010" or not is_word(further)


def is_right_clear(text: str, end: int) -> bool:
    """Whether a number can end at ``end``: not inside a word or a longer number."""
    after, further = text[end : end + 1], text[end + 1 : end + 2]
    if is_word(after):
        return False
    if after == ".":
        return not (further.isascii() and further.isdigit())
    return after != "-" or not is_word(further)


def is_clear(text: str, begin: int, end: int) -> bool:
    """Whether a number can begin and end here."""
    return is_left_clear(text, begin) and is_right_clear(text, end)


def is_word(character: str) -> bool:
    """Whether it is an ASCII letter, a digit or an underscore."""
    return character.isascii() and (character.isalnum() or character == "_")


_WITHOUT_GAPS = {ord(c): None for c in f" \n{DASHES}.()+"}
WITHOUT_DIGITS = {ord(c): None for c in "0123456789"}
_DIGITS = re.compile("[0-9]+")


def digits_of(candidate: str) -> str:
    """The digits of a candidate that has only digits, separators and a plus sign."""
    return candidate.translate(_WITHOUT_GAPS)


def group_ends(candidate: str) -> list[tuple[int, int]]:
    """The end of each group of digits, last first, and the number of digits before that end."""
    ends: list[tuple[int, int]] = []
    count = 0
    for group in _DIGITS.finditer(candidate):
        count += group.end() - group.start()
        ends.append((group.end(), count))
    return ends[::-1]


# Issuer prefixes of ISO/IEC 7812 numbers, and the lengths that are issued, from
# https://en.wikipedia.org/wiki/Payment_card_number#Issuer_identification_number_(IIN).
_ISSUERS: tuple[tuple[str, Iterable[int]], ...] = (
    ("4", (13, 16, 19)),  # Visa
    ("51-55 2221-2720", (16,)),  # Mastercard
    ("34 37", (15,)),  # American Express
    ("300-305 3095 36 38-39", range(14, 20)),  # Diners Club
    ("6011", range(16, 20)),  # Discover
    ("644-659", range(16, 20)),  # Discover, RuPay, Troy
    ("3528-3589", range(16, 20)),  # JCB
    ("60", (16,)),  # RuPay
    ("62", range(16, 20)),  # UnionPay
    ("81-82", range(16, 20)),  # UnionPay, RuPay
    ("2200-2204", range(16, 20)),  # Mir
    ("9792", (16,)),  # Troy
    ("5018 5020 5038 5893 6304 6759-6763", range(13, 20)),  # Maestro
)


def _lengths_by_prefix() -> dict[str, set[int]]:
    lengths: defaultdict[str, set[int]] = defaultdict(set)
    for prefixes, issued in _ISSUERS:
        for prefix in prefixes.split():
            low, _, high = prefix.partition("-")
            for number in range(int(low.ljust(4, "0")), int((high or low).ljust(4, "9")) + 1):
                lengths[f"{number:04}"].update(issued)
    return dict(lengths)


_CARD_LENGTHS = _lengths_by_prefix()
_DOUBLED = bytes.maketrans(b"0123456789", bytes((0, 2, 4, 6, 8, 1, 3, 5, 7, 9)))


def _luhn(number: str) -> bool:
    """Luhn's checksum (ISO/IEC 7812-1, annex B)."""
    digits = number.encode()
    single, doubled = digits[-1::-2], digits[-2::-2]
    return (sum(single) - len(single) * ord("0") + sum(doubled.translate(_DOUBLED))) % 10 == 0


def card_end(text: str, begin: int, end: int) -> int | None:
    """A payment card: an issuer's prefix and length, one kind of separator, and Luhn's checksum.

    It may be broken over two lines.
    """
    lengths = _CARD_LENGTHS.get(text[begin : begin + 4])
    if lengths is None or not is_left_clear(text, begin):
        return None
    candidate = text[begin:end]
    number = digits_of(candidate)
    for stop, count in group_ends(candidate):
        if (
            count in lengths
            and _is_even(candidate[:stop].translate(WITHOUT_DIGITS))
            and _luhn(number[:count])
            and is_right_clear(text, begin + stop)
        ):
            return begin + stop
    return None


def _is_even(gaps: str) -> bool:
    """Whether separators are of one kind, apart from one line break."""
    return gaps.count("\n") <= 1 and len(set(gaps) - {"\n"}) <= 1


def ssn_end(text: str, begin: int, end: int) -> int | None:
    """A US social security number with one kind of separator."""
    alike = text[begin + 3] == text[begin + 6]
    found = alike and _is_issued(digits_of(text[begin:end])) and is_clear(text, begin, end)
    return end if found else None


def _is_issued(number: str) -> bool:
    """Whether a social security number can have been issued (SSA, POMS RM 10201.035).

    The area is never 000, 666 or 900 to 999, the group never 00, the serial number never 0000.
    """
    area, group, serial = number[:3], number[3:5], number[5:]
    return area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"


_SSN_WORDS = LinearPattern(
    r"(?i)\b(?:ssn|social\s+security)(?:\s+(?:number|no\.?|is))*[\s.:#=\"']*\z"
)
_VERSION_WORDS = LinearPattern(
    r"(?i)\b(?:v|ver|version|release|rev|revision|build|firmware|driver|kernel|sdk|section|sec|"
    r"chapter|clause|paragraph|oid)\.?\s*[:=]?\s*\z"
)


def left_of(text: str, begin: int) -> str:
    """The text before a candidate that a check may look at."""
    return text[max(0, begin - LEFT_CONTEXT) : begin]


def bare_ssn_end(text: str, begin: int, end: int) -> int | None:
    """Nine digits without separators, after "SSN" or "social security"."""
    if not _SSN_WORDS.search(left_of(text, begin)):
        return None
    return end if _is_issued(text[begin:end]) and is_clear(text, begin, end) else None


_LETTER_VALUES = {ord("A") + i: str(10 + i) for i in range(26)}


def iban_end(text: str, begin: int, end: int) -> int | None:
    """An IBAN: its country's length, and remainder 1 modulo 97 (ISO 13616-1, ISO 7064)."""
    length = IBAN_LENGTHS.get(text[begin : begin + 2].upper())
    account = text[begin:end].translate(_WITHOUT_GAPS)[: length or 0].upper()
    if length is None or len(account) < length:
        return None
    if int((account[4:] + account[:4]).translate(_LETTER_VALUES)) % 97 != 1:
        return None
    stop = begin
    for _ in range(length):
        while not is_word(text[stop]):
            stop += 1
        stop += 1
    written = text[begin:stop]
    if is_word(text[stop : stop + 1]) or written.count("\n") > 1:
        return None
    # Words behind two letters and two digits pass the check once in a hundred times.
    is_code = written.isupper() or written.isalnum() or sum(map(str.isdigit, written)) > length / 2
    return stop if is_code else None


def ipv4_end(text: str, begin: int, end: int) -> int | None:
    """An IPv4 address that is not a version number."""
    if end - begin > 15 or not is_clear(text, begin, end):
        return None
    # Product/1.2.3.4 is a user agent's version; //1.2.3.4 is a host.
    if begin > 1 and text[begin - 1] == "/" and is_word(text[begin - 2]):
        return None
    if begin and text[begin - 1] in "~^":
        return None
    try:
        ipaddress.IPv4Address(text[begin:end])
    except ValueError:
        return None
    return None if is_version(text, begin) else end


def is_version(text: str, begin: int) -> bool:
    """Whether a word such as "version" is before a number."""
    return _VERSION_WORDS.search(left_of(text, begin)) is not None


_IPV6_CHARACTERS = frozenset("0123456789abcdefABCDEF:.")


def ipv6_end(text: str, begin: int, end: int) -> int | None:
    """An IPv6 address, without zone and prefix length, that is not likely code or a time.

    An address of two groups counts only when the first group has four digits (``fe80::1``).
    """
    before, further = text[max(0, begin - 1) : begin], text[max(0, begin - 2) : max(0, begin - 1)]
    if is_word(before) or before == "." or (before == ":" and further in _IPV6_CHARACTERS):
        return None
    if is_word(text[end : end + 1]):
        return None
    body = text[begin:end].rstrip(".")
    if body.endswith(":") and not body.endswith("::"):
        body = body[:-1]
    if len(body) > 45:  # The longest spelling, with an IPv4 address at its end.
        return None
    groups = [group for group in body.split(":") if group]
    # `[::2]` is usually a slice, `a::b` a scope, and eight pairs are usually an EUI-64.
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
