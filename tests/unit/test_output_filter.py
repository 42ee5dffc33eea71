"""The output filter: control characters, template tokens and blocked patterns."""

from __future__ import annotations

import itertools
import os
import random
from typing import NamedTuple

import pytest

from app.core.output_filter import OutputFilter, StreamFilter
from app.core.pii.patterns import WINDOW
from tests.support.costs import is_linear

TOKENS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<end_of_turn>", "[INST]", "aab", "ab", " "]
BLOCKED = [r"(?i)\bsecret\s+plan\b", r"b{3,}z", r"^X|Y$", r"k[^k]*k", r"(?m)^#"]
TOKENS_ONLY = OutputFilter(TOKENS)
BOTH = OutputFilter(TOKENS, BLOCKED)
OPAQUE = OutputFilter((), [r"x{,2}[[:digit:]]!"])
# The suite tries a third of the random texts.
SHARE = 1 if "FULL_SIZE" in os.environ else 3

PIECES = [
    *(
        "<|im_",
        "start|>",
        "<|im_end|>",
        "end|>",
        "<s>",
        "</s",
        "|>",
        ">",
        "<",
        "</",
        "|",
        "[INST",
        "]",
    ),
    *(
        "a",
        "aa",
        "aab",
        "b",
        "ab",
        "secret",
        "plan",
        "SECRET plan",
        "z",
        "bbbz",
        "X",
        "Y",
        "#",
        "k",
    ),
    *(
        "\x00",
        "\x1b[31m",
        "\u202e",
        "\ud83d",
        "\n",
        "\r\n",
        "\t",
        " ",
        "hello ",
        "\u00e9",
        "\U0001f600",
    ),
    *(
        "2!",
        "xx1!",
        "<end_of_turn>",
        "_of_turn>",
        "<|im_" * 8,
        "k" + "q" * 254,
        "q" * 300,
        "<" * 300,
    ),
]


class Filtered(NamedTuple):
    """A filtered text, and whether a blocked pattern ended it."""

    text: str
    blocked: bool


def clean(rules: OutputFilter, text: str) -> Filtered:
    """Filter a text that comes in one piece."""
    filtering = StreamFilter(rules)
    return Filtered(filtering.feed(text) + filtering.flush(), filtering.blocked)


def chunks(text: str, rng: random.Random) -> list[str]:
    """Cut ``text`` at random places; one time in ten after every character."""
    if rng.random() < 0.1:
        return list(text)
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 6)))
    return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]


def stream(rules: OutputFilter, pieces: list[str]) -> Filtered:
    """Feed all pieces, and check on the way that not too much is held back."""
    filtering = StreamFilter(rules)
    bound = rules.tokens.bound + (WINDOW if rules.patterns else 0)
    out = []
    for piece in pieces:
        out.append(filtering.feed(piece))
        assert filtering.held <= bound
    out.append(filtering.flush())
    return Filtered("".join(out), filtering.blocked)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\x00b\x07c\x1b[31m\x7f\x85\x9f", "abc[31m"),
        ("tab\tline\nreturn\r\n", "tab\tline\nreturn\r\n"),
        ("\u202eevil\u202c \u2066x\u2069", "evil x"),
        ("\u05d0\u200f\u0627\u061c\u200e", "\u05d0\u200f\u0627\u061c\u200e"),
        ("\U0001f468\u200d\U0001f469 caf\u00e9 \ud800", "\U0001f468\u200d\U0001f469 caf\u00e9 "),
    ],
)  # fmt: skip
def test_control_characters_go(text: str, cleaned: str) -> None:
    """Control characters and bidirectional overrides go; layout, emoji and RTL marks stay."""
    assert clean(OutputFilter(), text) == Filtered(cleaned, blocked=False)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("hello<|im_end|>", "hello"),
        ("<|im_start|>assistant<|im_end|>", "assistant"),
        ("<|im_<|im_end|>end|>ok", "ok"),
        ("<|im_\u202eend|>ok", "ok"),
        ("1 < 2 and <b>bold</b> <|im_", "1 < 2 and <b>bold</b> <|im_"),
        ("</s><s>", ""),
    ],
)
def test_template_tokens_go(text: str, cleaned: str) -> None:
    """Spellings of special tokens go, those that a removal would join included; the rest stays."""
    assert clean(OutputFilter(["<|im_start|>", "<|im_end|>", "<s>", "</s>"]), text).text == cleaned


def test_blank_tokens_are_ignored() -> None:
    """A tokenizer that lists a space among its special tokens does not cost the text its spaces."""
    assert clean(OutputFilter([" ", "", "\n\n"]), "a b\n\nc").text == "a b\n\nc"


def test_a_blocked_pattern_ends_the_text() -> None:
    """The text before the first match is delivered; the match and all text after it are not."""
    rules = OutputFilter((), [r"(?i)\bsecret\s+plan\b", "zzz"])
    assert clean(rules, "The SECRET\nplan is zzz") == Filtered("The ", blocked=True)
    assert clean(rules, "The secret planet") == Filtered("The secret planet", blocked=False)
    filtering = StreamFilter(rules)
    assert [filtering.feed(p) for p in ("all of the sec", "ret plan", "!", "more")] == [
        "all of the ", "", "", "",
    ]  # fmt: skip
    assert filtering.blocked
    assert filtering.flush() == ""


def test_patterns_see_what_would_be_delivered() -> None:
    """Patterns search the text without control characters and special tokens."""
    rules = OutputFilter(["<s>"], ["forbidden"])
    assert clean(rules, "a for<s>bid\x00den b") == Filtered("a ", blocked=True)


def test_a_blocked_match_has_a_longest_length() -> None:
    """A match of 256 characters blocks and one of 257 does not, whole or streamed."""
    rules = OutputFilter((), [r"<x+>"])
    for length, blocked in ((WINDOW, True), (WINDOW + 1, False)):
        text = f"a <{'x' * (length - 2)}> b"
        assert clean(rules, text).blocked is blocked
        assert stream(rules, list(text)) == clean(rules, text)


@pytest.mark.parametrize(
    ("source", "reason"), [("a(", "missing"), ("(?=a)", "invalid perl"), ("x?", "empty string")]
)
def test_a_bad_pattern_stops_the_start_in_one_line(source: str, reason: str) -> None:
    """An invalid pattern is a ValueError of one line that names it."""
    with pytest.raises(ValueError, match=reason) as caught:
        OutputFilter((), [source])
    assert str(caught.value).startswith(f"blocked pattern {source!r}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.no_cover
@pytest.mark.parametrize("rules", [TOKENS_ONLY, BOTH, OPAQUE])
def test_a_stream_equals_the_whole(rules: OutputFilter) -> None:
    """The joined results of a stream equal the filtered whole, and the held text is bounded.

    There are 100 texts, 300 in `make test-full`, each in 5 random chunkings and one character at a
    time.
    """
    rng = random.Random(5)
    for _ in range(300 // SHARE):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 14)))
        whole = clean(rules, text)
        for pieces in (list(text), *(chunks(text, rng) for _ in range(5))):
            assert stream(rules, pieces) == whole, text


@pytest.mark.no_cover
def test_patterns_block_what_one_look_at_the_whole_finds() -> None:
    """A stream ends at the first match that a search of the whole text finds."""
    rng = random.Random(7)
    for _ in range(500 // SHARE):
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 20)))
        delivered = clean(TOKENS_ONLY, text).text
        spans = [span for p in BOTH.patterns if (span := p.first(delivered, 0)) is not None]
        first = min((start for start, _ in spans), default=len(delivered))
        assert clean(BOTH, text) == Filtered(delivered[:first], blocked=bool(spans)), text


@pytest.mark.no_cover
def test_no_token_is_left() -> None:
    """No special token is in the result, however tokens are nested."""
    rng = random.Random(6)
    tokens = [token for token in TOKENS if token.strip()]
    for _ in range(700 // SHARE):
        text = "".join(rng.choices(PIECES[:20], k=rng.randint(1, 20)))
        assert not any(token in clean(TOKENS_ONLY, text).text for token in tokens), text


def test_text_flows() -> None:
    """Text that no token and no pattern can begin with is passed on at once."""
    filtering = StreamFilter(BOTH)
    for piece in ["Hello, ", "1 < 2. ", "Use <div>. ", "12 of them, ", "too\n"]:
        assert filtering.feed(piece) == piece
    plain = StreamFilter(OutputFilter())
    assert (plain.feed("<|im_"), plain.held, plain.flush()) == ("<|im_", 0, "")


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "unit", ["<", "<|im_", "<|im_<|im_end|>", "a", "b", "secret ", "q", "<s>", "\x00", "#x "]
)
def test_hostile_text_costs_linear_time(unit: str) -> None:
    """Characters made to be costly take no time out of proportion."""
    assert is_linear(lambda text: clean(BOTH, "x" + text), unit)
