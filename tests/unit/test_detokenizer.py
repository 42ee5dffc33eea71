"""Text from tokens, piece by piece, and the stop strings that end it."""

import random

import pytest

from app.llm.detokenizer import Detokenizer, StopMatcher
from app.llm.engine.echo import build_tokenizer

TEXT = "Grüße 😀 aus 漢字 and plain text 👩‍👩‍👧."


def test_no_piece_splits_a_character() -> None:
    """Every piece consists of whole characters, even where each byte is a token."""
    tokenizer = build_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed([i]) for i in tokenizer.encode(TEXT).ids]
    assert "".join(pieces) == TEXT
    assert all("\ufffd" not in piece for piece in pieces)
    assert "😀" in pieces


def test_tokens_may_come_in_any_grouping() -> None:
    """Tokens give the same text however they are grouped into events."""
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(TEXT).ids
    for size in (1, 2, 3, 7, 1000):
        detokenizer = Detokenizer(tokenizer)
        groups = [ids[i : i + size] for i in range(0, len(ids), size)]
        assert "".join(map(detokenizer.feed, groups)) == TEXT


def test_an_answer_cut_inside_a_character_has_no_replacement() -> None:
    """An incomplete character at the end is dropped, not shown as U+FFFD."""
    tokenizer = build_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.feed(tokenizer.encode("ok 😀").ids[:-1]) == "ok "


def whole(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, by the plainest definition."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("one two three", ["two"]),
        ("one two three", ["three", "two"]),
        ("aaab", ["aab"]),
        ("abcabcabd", ["abcabd"]),
        ("no stop here", ["x", "yy"]),
        ("ends with sto", ["stop"]),
        ("stop", ["stop"]),
        ("", ["stop"]),
        ("no stops at all", []),
        ("ein 😀 Ende", ["😀 E"]),
    ],
)
def test_every_cut_gives_the_text_before_the_first_stop(text: str, stops: list[str]) -> None:
    """The text before the stop string is passed on, however the text is cut."""
    rng = random.Random(0)
    for _ in range(200):
        matcher = StopMatcher(stops)
        passed, position, stopped = "", 0, False
        while position < len(text) and not stopped:
            step = rng.randint(1, 4)
            piece, stopped = matcher.feed(text[position : position + step])
            passed += piece
            position += step
        if not stopped:
            passed += matcher.flush()
        assert passed == whole(text, stops)
        assert stopped == any(s in text for s in stops)


def test_random_texts_over_a_tiny_alphabet() -> None:
    """Stop strings that overlap in any way give what the plain definition gives."""
    rng = random.Random(1)
    for _ in range(3000):
        text = "".join(rng.choice("ab") for _ in range(rng.randint(0, 20)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randint(1, 5))) for _ in range(2)]
        matcher = StopMatcher(stops)
        passed, stopped = "", False
        for character in text:
            piece, stopped = matcher.feed(character)
            passed += piece
            if stopped:
                break
        passed += "" if stopped else matcher.flush()
        assert passed == whole(text, stops)


def test_only_a_possible_stop_string_is_held_back() -> None:
    """Text that cannot become a stop string is passed on at once."""
    matcher = StopMatcher(["stop"])
    assert matcher.feed("hello s") == ("hello ", False)
    assert matcher.feed("t") == ("", False)
    assert matcher.feed("ay") == ("stay", False)
