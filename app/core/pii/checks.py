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

# Separators of digits: spaces (also no-break, thin, narrow no-break), hyphen-minus, typographic
# hyphens and dashes, which language models often write.
SPACES = " \u00a0\u2009\u202f"
DASHES = "-\u2010\u2011\u2012\u2013"

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


def _left_clear(text: str, begin: int) -> bool:
    """Whether a number can begin at ``begin``: not inside a word, a longer number or a price."""
    if not begin:
        return True
    before = text[begin - 1]
    if _is_word(before) or before in "+$\u20ac\u00a3\u00a5":
        return False
    further = text[begin - 2 : begin - 1] if begin > 1 else ""
    if before == ".":
        return not (further.isascii() and further.isdigit())
    return before not in "-\u2010\u2011" or not _is_word(further)


def _right_clear(text: str, end: int) -> bool:
    """Whether a number can end at ``end``: not inside a word or a longer number."""
    after, further = text[end : end + 1], text[end + 1 : end + 2]
    if _is_word(after):
        return False
    if after == ".":
        return not (further.isascii() and further.isdigit())
    return after != "-" or not _is_word(further)


def _clear(text: str, begin: int, end: int) -> bool:
    return _left_clear(text, begin) and _right_clear(text, end)


def _is_word(character: str) -> bool:
    return character.isascii() and (character.isalnum() or character == "_")


_WITHOUT_GAPS = {ord(c): None for c in f"{SPACES}{DASHES}.()+"}
_WITHOUT_DIGITS = {ord(c): None for c in "0123456789"}
_DIGITS = re.compile("[0-9]+")


def _digits(candidate: str) -> str:
    """The digits of a candidate that has only digits, separators and a plus sign."""
    return candidate.translate(_WITHOUT_GAPS)


def _group_ends(candidate: str) -> list[tuple[int, int]]:
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
    """A payment card: an issuer's prefix and length, one kind of separator, and Luhn's checksum."""
    lengths = _CARD_LENGTHS.get(text[begin : begin + 4])
    if lengths is None or not _left_clear(text, begin):
        return None
    candidate = text[begin:end]
    number = _digits(candidate)
    for stop, count in _group_ends(candidate):
        if (
            count in lengths
            and len(set(candidate[:stop].translate(_WITHOUT_DIGITS))) <= 1
            and _luhn(number[:count])
            and _right_clear(text, begin + stop)
        ):
            return begin + stop
    return None


def ssn_end(text: str, begin: int, end: int) -> int | None:
    """A US social security number with one kind of separator."""
    alike = text[begin + 3] == text[begin + 6]
    found = alike and _is_issued(_digits(text[begin:end])) and _clear(text, begin, end)
    return end if found else None


def _is_issued(number: str) -> bool:
    """Whether a social security number can have been issued (SSA, POMS RM 10201.035).

    The area is never 000, 666 or 900 to 999, the group never 00, the serial number never 0000.
    """
    area, group, serial = number[:3], number[3:5], number[5:]
    return area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"


def nanp_end(text: str, begin: int, end: int) -> int | None:
    """A North American telephone number: three, three and four digits.

    Real area codes and exchanges begin with 2 to 9 (NANPA), but people write 555-123-4567 and
    123-456-7890. So the rule is applied only where all separators are spaces, which any three
    numbers may have between them.
    """
    number = _digits(text[begin:end])[-10:]
    area, exchange = number[:3], number[3:6]
    if area[0] == "0" or exchange[0] == "0" or area[1:] == "11":
        return None
    gaps = text[begin:end].translate(_WITHOUT_DIGITS)
    if not gaps.strip(SPACES) and (area[0] == "1" or exchange[0] == "1"):
        return None
    # 415-555-2671 and 415 555-2671, but not the coordinates 277.764 1035.
    alike = gaps[-2] == gaps[-1] or (gaps[-2] in SPACES and gaps[-1] in DASHES)
    if not alike and ")" not in gaps:
        return None
    return end if _clear(text, begin, end) else None


def e164_end(text: str, begin: int, end: int) -> int | None:
    """A plus sign and 8 to 15 digits with the country code (ITU-T E.164, section 6.2.1)."""
    if begin and (_is_word(text[begin - 1]) or text[begin - 1] == "+"):
        return None
    candidate = text[begin:end]
    # Country code 1 has one length. For others the longest number that fits is taken.
    lowest, highest = (11, 11) if candidate[1] == "1" else (8, 15)
    for stop, count in _group_ends(candidate):
        if lowest <= count <= highest and _right_clear(text, begin + stop):
            return begin + stop
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


def bare_phone_end(text: str, begin: int, end: int) -> int | None:
    """Ten digits without separators, after a word such as "phone"."""
    found = _clear(text, begin, end) and _PHONE_WORDS.search(_left_of(text, begin))
    return end if found else None


def bare_ssn_end(text: str, begin: int, end: int) -> int | None:
    """Nine digits without separators, after "SSN" or "social security"."""
    if not _SSN_WORDS.search(_left_of(text, begin)):
        return None
    return end if _is_issued(text[begin:end]) and _clear(text, begin, end) else None


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
        while not _is_word(text[stop]):
            stop += 1
        stop += 1
    return None if _is_word(text[stop : stop + 1]) else stop


def ipv4_end(text: str, begin: int, end: int) -> int | None:
    """An IPv4 address that is not a version number."""
    if end - begin > 15 or not _clear(text, begin, end):
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


def ipv6_end(text: str, begin: int, end: int) -> int | None:
    """An IPv6 address, without zone and prefix length, that is not likely code or a time.

    An address of two groups counts only when the first group has four digits (``fe80::1``).
    """
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
