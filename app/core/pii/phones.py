"""Checks of telephone numbers: international, North American, and national by region.

Which national numbers exist is taken from libphonenumber's metadata, in the package phonenumbers.
Its matcher is slow on long texts and knows no streams, so RE2 runs the metadata's patterns.
"""

import re
from collections.abc import Iterable, Iterator

from phonenumbers import (
    NumberParseException,
    PhoneMetadata,
    PhoneNumberDesc,
    is_valid_number,
    parse,
)

from app.core.pii.checks import (
    DASHES,
    WITHOUT_DIGITS,
    digits_of,
    group_ends,
    is_clear,
    is_left_clear,
    is_right_clear,
    is_version,
    is_word,
    left_of,
)
from app.core.pii.patterns import LinearPattern


def nanp_end(text: str, begin: int, end: int) -> int | None:
    """A North American telephone number: three, three and four digits.

    Real area codes and exchanges begin with 2 to 9 (NANPA), but people write 555-123-4567 and
    123-456-7890. So the rule is applied only where all separators are spaces, which any three
    numbers may have between them.
    """
    number = digits_of(text[begin:end])[-10:]
    area, exchange = number[:3], number[3:6]
    if area[0] == "0" or exchange[0] == "0" or area[1:] == "11":
        return None
    gaps = text[begin:end].translate(WITHOUT_DIGITS)
    if not gaps.strip() and (area[0] == "1" or exchange[0] == "1"):
        return None
    # 415-555-2671 and 415 555-2671, but not the coordinates 277.764 1035.
    alike = gaps[-2] == gaps[-1] or (gaps[-2] == " " and gaps[-1] in DASHES)
    if not alike and ")" not in gaps:
        return None
    return end if is_clear(text, begin, end) else None


def e164_end(text: str, begin: int, end: int) -> int | None:
    """A plus sign and 8 to 15 digits with the country code (ITU-T E.164, section 6.2.1)."""
    if begin and (is_word(text[begin - 1]) or text[begin - 1] == "+"):
        return None
    candidate = text[begin:end]
    # Country code 1 has one length. For others the longest number that fits is taken.
    lowest, highest = (11, 11) if candidate[1] == "1" else (8, 15)
    for stop, count in group_ends(candidate):
        if lowest <= count <= highest and is_right_clear(text, begin + stop):
            return begin + stop
    return None


_GAP = rf" ?[{DASHES}./]? ?"
NATIONAL = rf"(?:\(\d{{1,5}}\)|\b\d)(?:{_GAP}\d){{5,14}}"
"""RE2 source of the longest candidate for :meth:`NationalNumbers.end`."""

_WORDS = LinearPattern(
    r"(?i)\b(?:phone|tel|telephone|mobile|cell|call|fax|text|sms|whatsapp|dial|handy|mobil|telefone?|"
    r"t\x{e9}l|t\x{e9}l\x{e9}phone|portable|tel\x{e9}fono|m\x{f3}vil|cellulare|celular|gsm|natel)"
    r"(?:\s+(?:number|no\.?|nr\.?|me|us|him|her|them|at|on|is))*[\s.:#=\"']*\z"
)
# Dates, thousands in groups, decimal fractions, an ISBN of group 0, and a ZIP+4 code.
_OTHER_NUMBERS = re.compile(
    rf"\d{{1,2}}([{DASHES} ./])\d{{1,2}}\1(?:19|20)\d\d(?!\d)"
    r"|\d{1,2}([./])\d{1,2}\2\d\d(?![./\d])"
    r"|\d{1,3}(?:\.\d{3})+(?![.\d])|\d+\.\d+(?![.\d])|0[.\-]|\d{5}-\d{4}(?!\d)"
)
_GROUPS = re.compile("[0-9]+")
_SIGNS = frozenset("\u20ac$\u00a3\u00a5%")
_FEWEST_DIGITS = 8
# Digits in one group, without a word, are a number only with a trunk prefix and in these lengths.
# The last is what people write for "all digits".
_UNBROKEN = range(10, 12)
_ALL_DIGITS = "0123456789"
# Groups that are usual and that the metadata does not have: 612 345 678, 91 330 28 00.
_MORE_SHAPES = {"ES": [r"\d{3} \d{3} \d{3}", r"\d{2} \d{3} \d{2} \d{2}"]}


class NationalNumbers:
    """National telephone numbers of some regions.

    Args:
        regions: Codes of ISO 3166-1, in capitals.

    Raises:
        ValueError: A region that libphonenumber does not know.
    """

    def __init__(self, regions: Iterable[str]) -> None:
        known = {region: _metadata(region) for region in regions}
        every = [(m.national_prefix or "", _numbers(m)) for m in known.values()]
        self.north_american = any(m.country_code == 1 for m in known.values())
        self._valid = LinearPattern("|".join(f"(?:{p})?{n}\\z" for p, n in every) or "x")
        # Italian numbers begin with 0 and have no prefix.
        self._prefixes = ("0", *(p for p, _ in every if p not in ("", "1")))
        self._bare = [
            (LinearPattern(rf"{_numbers(m)}\z"), list(_shapes(region, m)))
            for region, m in known.items()
        ]
        shapes = (shape.pattern for _, forms in self._bare for _, shape in forms)
        self._shape = re.compile("|".join(sorted(set(shapes))) or "x")

    def end(self, text: str, begin: int, end: int) -> int | None:
        """The end of a number that is written as people of its region write it.

        It has its trunk prefix ("020 7946 0958"); or it needs none, and has the usual groups
        ("612 345 678"); or a word such as "phone" is before it; or it begins with 00 and a country
        code.
        """
        candidate = text[begin:end]
        if not _begins(text, begin) or _OTHER_NUMBERS.match(candidate):
            return None
        named: bool | None = None
        groups = [match.span() for match in _GROUPS.finditer(candidate)]
        following = 0
        for start, stop in reversed(groups):
            # The groups of "01 02 03 04 05 06" go on as they began, so no part is a number.
            goes_on, following = following == stop - start, stop - start
            if not goes_on and _ends(text, begin + stop):
                if named is None:
                    named = _WORDS.search(left_of(text, begin)) is not None
                if self._is_number(_GROUPS.findall(candidate[:stop]), named=named):
                    return begin + stop
        return None

    def _is_number(self, groups: list[str], *, named: bool) -> bool:
        digits = "".join(groups)
        if len(digits) < _FEWEST_DIGITS:
            return False
        if digits.startswith("00"):
            return _is_international(digits[2:])
        if not self._valid.match(digits):
            return False
        if len(digits) > _FEWEST_DIGITS:
            prefixed = digits.startswith(self._prefixes)
            usual = len(digits) in _UNBROKEN and digits != _ALL_DIGITS
            if named or (prefixed and (len(groups) > 1 or usual)):
                return True
        spaced = " ".join(groups)
        return self._shape.fullmatch(spaced) is not None and any(
            any(first.match(digits) and shape.fullmatch(spaced) for first, shape in forms)
            and numbers.match(digits)
            for numbers, forms in self._bare
        )


def _begins(text: str, begin: int) -> bool:
    """Whether a number can begin here: not in a longer row of numbers, nor after "version"."""
    before = text[begin - 1 : begin]
    row = begin > 1 and before in f" ,/{DASHES}" and text[begin - 2].isdigit()
    return is_left_clear(text, begin) and before != "#" and not row and not is_version(text, begin)


def _ends(text: str, end: int) -> bool:
    """Whether a number can end here, with no currency behind it."""
    return is_right_clear(text, end) and text[end : end + 2].strip()[:1] not in _SIGNS


def _is_international(digits: str) -> bool:
    try:
        return is_valid_number(parse(f"+{digits}"))
    except NumberParseException:
        return False


def _metadata(region: str) -> PhoneMetadata:
    metadata = PhoneMetadata.metadata_for_region(region, None)
    if metadata is None:
        raise ValueError(f"pii region {region!r} is not known, such as 'GB'")
    return metadata


def _numbers(metadata: PhoneMetadata) -> str:
    """A pattern of all numbers of a region, without a trunk prefix."""
    kinds: tuple[PhoneNumberDesc | None, ...] = (
        metadata.fixed_line,
        metadata.mobile,
        metadata.toll_free,
        metadata.shared_cost,
        metadata.premium_rate,
        metadata.personal_number,
        metadata.voip,
        metadata.uan,
    )
    patterns = (kind.national_number_pattern for kind in kinds if kind is not None)
    return f"(?:{'|'.join(pattern for pattern in patterns if pattern)})"


def _shapes(
    region: str, metadata: PhoneMetadata
) -> Iterator[tuple[re.Pattern[str], re.Pattern[str]]]:
    """First digits and groups, with a space in each gap, of numbers that have no trunk prefix.

    The groups after the first may be joined, as in "612 345678".
    """
    for form in metadata.number_format:
        rule = (form.national_prefix_formatting_rule or "").lstrip("(")
        needs_prefix = rule.startswith(metadata.national_prefix or "-")
        if form.national_prefix_optional_when_formatting or not needs_prefix:
            first = re.compile((form.leading_digits_pattern or [""])[-1])
            groups = (form.pattern or "").replace("(", "").split(")")[:-1]
            if len(groups) > 1:
                spaced, joined = " ".join(groups[1:]), "".join(groups[1:])
                yield first, re.compile(f"{groups[0]} (?:{spaced}|{joined})")
    for shape in _MORE_SHAPES.get(region, ()):
        yield re.compile(""), re.compile(shape)
