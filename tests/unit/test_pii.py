"""The PII filter: what it finds, what it leaves alone, and that streams give equal results."""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter

import phonenumbers
import pytest
from phonenumbers import PhoneNumberFormat, PhoneNumberType

from app.core.config import REGIONS
from app.core.pii.detectors import HOLD_BACK, KINDS, Detector, built_in
from app.core.pii.folding import fold
from app.core.pii.patterns import WINDOW, BoundedPattern, LinearPattern, prefixes_of
from app.core.pii.scanner import Entity, PiiScanner, StreamRedactor
from scripts.pii_report import score
from tests.data import pii_public
from tests.data.pii_cases import FOUND, HOSTILE, LONG, MATCHING, NOT_FOUND, PIECES, SOURCES
from tests.data.pii_corpus import OUT_OF_SCOPE, negatives, positives
from tests.support.costs import is_linear

SCANNER = PiiScanner()
CUSTOM = PiiScanner(
    custom=[
        ("employee_id", r"\bEMP-\d{6}\b"),
        ("project", r"(?i)project\s+\w+"),
        ("quoted", r'"[^"]*"'),
        ("last", r"fin$"),
        ("begin", r"^start"),
        ("letters", r"a+b|ab*c"),
    ]
)
# The suite tries a third of the random texts.
SHARE = 1 if "FULL_SIZE" in os.environ else 3
# Python's parser and RE2's read {,3} differently, so the prefixes of a match are not known.
OPAQUE = PiiScanner(custom=[("opaque", r"x{,3}y|[[:alpha:]]+!")])


def chunks(text: str, rng: random.Random) -> list[str]:
    """Cut ``text`` at random places; one time in ten after every character."""
    if rng.random() < 0.1:
        return list(text)
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 6)))
    return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]


def at_once(scanner: PiiScanner, text: str) -> str:
    """The redacted text by one search of the whole text, without a stream."""
    text = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
    # Where each character of the folded text is in the text.
    places = [place for place, character in enumerate(text) if fold(character)]
    out, at = "", 0
    for entity in scanner.walk(fold(text), 0, len(places)):
        out += f"{text[at : places[entity.start]]}[{entity.kind.upper().replace('_', '-')}]"
        at = places[entity.end - 1] + 1
    return out + text[at:]


def stream(redactor: StreamRedactor, pieces: list[str]) -> str:
    """Feed all pieces, and check after each that no more than HOLD_BACK is held back."""
    out = []
    for piece in pieces:
        out.append(redactor.feed(piece))
        assert redactor.held <= HOLD_BACK
    return "".join(out) + redactor.flush()


@pytest.mark.parametrize(
    "around", ["{}", "is {}.", "({})", "x\n{}\ny", "{}, then", '"{}"', "= {} ="]
)
def test_finds_each_form_of_each_kind(around: str) -> None:
    """Each supported form is found with its exact bounds between any punctuation."""
    start = around.index("{}")
    for kind, value in FOUND:
        found = SCANNER.find(around.replace("{}", value))
        assert found == [Entity(kind, start, start + len(value))], value


def test_leaves_lookalikes_alone() -> None:
    """Text that only looks like personal data is not changed."""
    for text in NOT_FOUND:
        assert SCANNER.redact(f"so {text} it is") == (f"so {text} it is", Counter())


def test_forms_out_of_scope_are_not_found() -> None:
    """The forms that the documentation excludes are not found."""
    for text in OUT_OF_SCOPE:
        assert SCANNER.find(text) == [], text


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("my phone number is 4155552671", "phone"),
        ("tel:14155552671", "phone"),
        ("SSN: 078051120", "ssn"),
        ("Social Security No. 078051120", "ssn"),
    ],
)
def test_a_word_makes_bare_digits_personal(text: str, kind: str) -> None:
    """Digits without separators are found after a word that names their kind."""
    assert [entity.kind for entity in SCANNER.find(text)] == [kind]


def test_impossible_bare_ssn_is_left_alone() -> None:
    """Numbers without separators that cannot be issued are not found."""
    assert SCANNER.find("ssn 666051120 ssn 900051120 ssn 078001120 ssn 078050000") == []


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("4111111111111111@example.com", "[EMAIL]"),
        ("10.0.0.1@example.com", "[EMAIL]"),
        ("415-555-2671@example.com", "[EMAIL]"),
        ("::ffff:192.0.2.128", "[IP]"),
        ("a@b.co@c.com", "[EMAIL]@c.com"),
        ("4111 1111 1111 1111 2024", "[CARD] 2024"),
        ("2024 4111 1111 1111 1111", "2024 [CARD]"),
        ("DE89 3704 0044 0532 0130 00 AND SO ON", "[IBAN] AND SO ON"),
        ("jane@example.com:hunter2", "[EMAIL]:hunter2"),
        ("a.git@example.com: git@example.com:x", "[EMAIL]: git@example.com:x"),
        ("wait...jane@example.com...", "wait...[EMAIL]..."),
        ("\u8054\u7cfbjane@example.com\u8c22\u8c22", "\u8054\u7cfb[EMAIL]\u8c22\u8c22"),
        (f"{'a' * 100}@example.com", f"{'a' * 36}[EMAIL]"),
        ("10.0.0.1:8080, 10.0.0.0/8", "[IP]:8080, [IP]/8"),
        ("+1 415 555 2671 12 people", "[PHONE] 12 people"),
    ],
)
def test_the_leftmost_and_longest_entity_wins(text: str, redacted: str) -> None:
    """Of overlapping entities the leftmost wins, then the longest."""
    assert SCANNER.redact(text)[0] == redacted


def test_counts_each_kind() -> None:
    """The counter has the number of replaced entities by kind."""
    text = "a@b.co, c@d.co, 10.0.0.1, 078-05-1120, EMP-123456"
    redacted, counts = CUSTOM.redact(text)
    assert redacted == "[EMAIL], [EMAIL], [IP], [SSN], [EMPLOYEE-ID]"
    assert counts == {"email": 2, "ip": 1, "ssn": 1, "employee_id": 1}


def test_offsets_are_those_of_the_whole_text() -> None:
    """Entities have indices into the whole text, also in a long one."""
    text = "word \u00e9 \U0001f600 " * 500 + "jane@example.com" + " more" * 200 + " 10.0.0.1"
    assert [text[e.start : e.end] for e in SCANNER.find(text)] == ["jane@example.com", "10.0.0.1"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_can_be_switched_off(kind: str) -> None:
    """A kind that is off is not found, and all others are."""
    values = {found: value for found, value in FOUND if found != "email"} | {"email": "a@b.co"}
    text = " ; ".join(values.values())
    scanner = PiiScanner(kinds=[other for other in KINDS if other != kind])
    assert Counter(e.kind for e in scanner.find(text)) == {k: 1 for k in KINDS if k != kind}


def test_without_kinds_text_passes_at_once() -> None:
    """A scanner without kinds holds nothing back."""
    redactor = PiiScanner(kinds=()).stream()
    assert redactor.feed("jane@exa") == "jane@exa"


@pytest.mark.parametrize(
    ("name", "pattern", "reason"),
    [
        ("x", "a(", "missing )"),
        ("x", "(?<=a)b", "invalid perl operator"),
        ("x", "\ud800", "surrogate"),
        ("x", "a*", "empty string"),
        ("x", r"\b", "empty string"),
        ("x", "a|$", "empty string"),
        ("x", "a" * 2001, "longer than 2000"),
        ("9x", "a", "a letter first"),
        ("x y", "a", "a letter first"),
        ("", "a", "a letter first"),
        ("x" * 33, "a", "1 to 32"),
        ("Email", "a", "built-in"),
    ],
)
def test_a_bad_pattern_stops_the_start_in_one_line(name: str, pattern: str, reason: str) -> None:
    """An invalid pattern or name is a ValueError of one line with the reason."""
    with pytest.raises(ValueError, match=reason.replace(")", r"\)")) as caught:
        PiiScanner(custom=[(name, pattern)])
    assert "\n" not in str(caught.value)
    assert "pii pattern" in str(caught.value)


def test_names_are_unique() -> None:
    """A repeated name is rejected."""
    with pytest.raises(ValueError, match="used twice"):
        PiiScanner(custom=[("x", "a"), ("X", "b")])


def test_a_custom_match_has_a_longest_length() -> None:
    """A custom match of 256 characters is found and one of 257 is not, whole or streamed."""
    scanner = PiiScanner(custom=[("long", r"<x+>")])
    for length, found in ((WINDOW, True), (WINDOW + 1, False)):
        text = f"a <{'x' * (length - 2)}> b"
        expected = "a [LONG] b" if found else text
        assert scanner.redact(text)[0] == expected
        assert stream(scanner.stream(), list(text)) == expected


def test_anchors_mean_the_whole_text() -> None:
    """In a custom pattern ^ and $ match at the ends of the text, not of a piece."""
    text = "start start fin fin"
    assert stream(CUSTOM.stream(), list(text)) == "[BEGIN] start fin [LAST]"


def test_surrogates_do_no_harm() -> None:
    """A lone surrogate becomes a replacement character instead of an error."""
    assert SCANNER.redact("\ud83d a@b.co")[0] == "\ufffd [EMAIL]"


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("scanner", "texts", "seed"),
    [
        pytest.param(SCANNER, 400, 1, id="built-in"),
        pytest.param(CUSTOM, 200, 2, id="custom"),
        pytest.param(OPAQUE, 150, 3, id="opaque"),
    ],
)
def test_a_stream_equals_the_whole(scanner: PiiScanner, texts: int, seed: int) -> None:
    """The joined results of a stream equal the redacted whole, and the held text is bounded.

    There are 250 texts, 750 in `make test-full`, each in 5 random chunkings and one character at a
    time.
    """
    rng = random.Random(seed)
    for _ in range(texts // SHARE):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 6)))
        whole, counts = scanner.redact(text)
        assert whole == at_once(scanner, text), text
        for pieces in (list(text), *(chunks(text, rng) for _ in range(5))):
            redactor = scanner.stream()
            assert stream(redactor, pieces) == whole, text
            assert redactor.counts == counts


@pytest.mark.no_cover
@pytest.mark.parametrize("scanner", [SCANNER, CUSTOM, OPAQUE])
def test_a_stream_equals_the_whole_beyond_the_bound(scanner: PiiScanner) -> None:
    """The same holds for texts with runs longer than HOLD_BACK."""
    rng = random.Random(4)
    for _ in range(120 // SHARE):
        text = "".join(rng.choices([*LONG, *PIECES[::3]], k=rng.randint(2, 12)))
        whole = at_once(scanner, text)
        assert scanner.redact(text)[0] == whole, text
        for _ in range(3):
            assert stream(scanner.stream(), chunks(text, rng)) == whole, text


@pytest.mark.no_cover
@pytest.mark.parametrize("detector", built_in(REGIONS), ids=lambda detector: str(detector.kind))
def test_where_a_search_begins_does_not_matter(detector: Detector) -> None:
    """The first entity is the same whatever place before it the search begins at."""
    rng = random.Random(8)
    texts = [*NOT_FOUND, *("".join(rng.choices(PIECES, k=3)) for _ in range(100))]
    for text in (text.replace("\ud83d", "") for text in texts):
        first = detector.first(text, 0)
        for start in range(1, len(text) if first is None else first[0] + 1):
            assert detector.first(text, start) == first, (text, start)


def test_prose_flows() -> None:
    """Ordinary prose is passed on at once."""
    redactor = CUSTOM.stream()
    for piece in ["Hello, ", "the city had 48,213 people ", "(in 1999) ", "and 12 gates. ", "\n"]:
        assert redactor.feed(piece) == piece


def test_text_that_may_become_an_entity_is_held_back() -> None:
    """Text that may be the beginning of an entity is not passed on."""
    redactor = SCANNER.stream()
    assert redactor.feed("Mail jane@exam") == "Mail "
    assert redactor.feed("ple.com") == ""
    assert redactor.feed(" or 4111 1111 1111 11") == "[EMAIL] or "
    assert redactor.feed("11") == ""
    assert redactor.flush() == "[CARD]"


@pytest.mark.no_cover
@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_text_costs_linear_time(unit: str) -> None:
    """The time for adversarial characters is linear in their number."""
    assert is_linear(CUSTOM.redact, unit)


@pytest.mark.parametrize("source", SOURCES)
def test_derived_prefixes_cover_every_match(source: str) -> None:
    """The derived pattern matches every prefix of every match."""
    derived = prefixes_of(source)
    assert derived is not None
    fits = LinearPattern(f"(?:{derived})\\z")
    pattern = BoundedPattern(source)
    matches = [w[slice(*span)] for w in MATCHING if (span := pattern.first(w, 0)) is not None]
    assert matches
    for match in matches:
        assert all(fits.match(match[:n]) for n in range(len(match) + 1)), match


@pytest.mark.parametrize(
    "source", ["a{,3}b", "[[:alpha:]]x", r"\pLx", r"\x{41}", "(" * 120 + "ab" + ")*c" * 120]
)
def test_unknown_prefixes_hold_a_window(source: str) -> None:
    """Where no prefixes can be derived, a whole window is held back."""
    assert prefixes_of(source) is None
    redactor = PiiScanner(kinds=(), custom=[("x", source)]).stream()
    assert redactor.feed("." * 1000) == "." * (1000 - WINDOW)


def test_the_corpus_is_large_enough() -> None:
    """The corpus has 500 texts with entities and 500 hard negatives, the same in every run."""
    assert len(positives()) >= 500
    assert len(negatives()) >= 500
    assert positives() == positives()
    assert negatives() == negatives()


def test_recall_and_precision_stay() -> None:
    """Recall is at least 0.97 and precision at least 0.97 for each kind, on the corpus.

    Measured: recall 0.982 to 0.991; precision 0.981 for cards and 1.000 for all others.
    """
    result = score(positives() + negatives())
    for kind in KINDS:
        assert result.recall(kind) >= 0.97, kind
        assert result.precision(kind) >= 0.97, kind


def test_public_formats_are_found() -> None:
    """Recall is at least 0.9 and precision at least 0.9 for each kind, on public formats.

    Measured: 0.938 for e-mail addresses, and 1.000 for all others.
    """
    result = score(pii_public.positives() + pii_public.negatives())
    for kind in KINDS:
        assert result.recall(kind) >= 0.9, kind
        assert result.precision(kind) >= 0.9, kind


def test_the_librarys_example_numbers_are_found() -> None:
    """Of libphonenumber's examples, 95 in 100 are found in the national form of each region."""
    found: list[bool] = []
    for region in REGIONS:
        for kind in (PhoneNumberType.FIXED_LINE, PhoneNumberType.MOBILE, PhoneNumberType.TOLL_FREE):
            number = phonenumbers.example_number_for_type(region, kind)
            assert number is not None
            written = phonenumbers.format_number(number, PhoneNumberFormat.NATIONAL)
            expected = [Entity("phone", 3, 3 + len(written))]
            found.append(SCANNER.find(f"It {written}, then.") == expected)
    assert sum(found) >= 0.95 * len(found)


def test_national_numbers_are_those_of_the_regions() -> None:
    """A national number is found where its region is configured, and nowhere else."""
    texts = {"US": "415-555-2671", "GB": "020 7946 0958", "ES": "91 330 28 00", "DK": "32 12 34 56"}
    for region, text in texts.items():
        assert [e.kind for e in PiiScanner(regions=[region]).find(text)] == ["phone"], region
        assert PiiScanner(regions=[]).find(text) == [], region
    with pytest.raises(ValueError, match="pii region 'XX'"):
        PiiScanner(regions=["XX"])


def test_what_is_written_otherwise_stays_as_it_is() -> None:
    """Folding finds entities; the text around them keeps its characters, dropped ones included."""
    text = "\u200b\uff21\u00ad \u2075: \uff14\uff11\uff15-555-\u200b2671\u2060 \ufb01n\u200d"
    redacted = "\u200b\uff21\u00ad \u2075: [PHONE]\u2060 \ufb01n\u200d"
    assert SCANNER.redact(text)[0] == redacted
    assert stream(SCANNER.stream(), list(text)) == redacted
    with pytest.raises(ValueError, match="texts are folded, write 'A'"):
        PiiScanner(custom=[("x", "\uff21")])
