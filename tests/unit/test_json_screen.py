"""Answers in JSON are screened string by string, and stay JSON."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest

from app.core.config import OutputSettings, PiiSettings
from app.core.metrics import Metrics
from app.core.pii.scanner import PiiScanner
from app.llm.protocol import ANY_OBJECT, Grammar, JsonSchemaGrammar, RegexGrammar
from app.services.screening import Screening
from tests.support.costs import is_linear

SCHEMA = JsonSchemaGrammar('{"type": "object", "properties": {"card": {"type": "integer"}}}')
REDACTING = Screening(PiiSettings(output="redact"), OutputSettings(), Metrics())
SCANNER = PiiScanner()
TOKENS = ("<|im_end|>",)
HERMES, LLAMA = "<tool_call>", '{"name": "'


def screened(
    text: str,
    grammar: Grammar | None = ANY_OBJECT,
    *,
    trigger: str | None = None,
    screening: Screening = REDACTING,
) -> str:
    """The text as a caller sees it, which must not depend on where it is cut."""

    def run(pieces: list[str]) -> tuple[str, bool, bool]:
        screen = screening.answer(TOKENS, grammar, trigger)
        out = "".join(screen.feed(piece) for piece in pieces) + screen.flush()
        return out, screen.blocked, screen.changed

    whole = run([text])
    rng = random.Random(text)
    cuts = [sorted(rng.choices(range(len(text) + 1), k=5)) for _ in range(5)]
    parts = [[text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])] for places in cuts]
    for pieces in (list(text), *parts):
        assert run(pieces) == whole, text
    return whole[0]


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        (r'{"a": "Mail\njane@example.com\n"}', r'{"a": "Mail\n[EMAIL]\n"}'),
        (r'{"a": "jane\u0040example.com"}', '{"a": "[EMAIL]"}'),
        (r'{"a": "\u0034111 1111 1111 1111"}', '{"a": "[CARD]"}'),
        (r'{"a": "jane@example\u002ecom", "b": "caf\u00e9 \ud83d\ude00 \/"}', None),
        (r'{"ip": "say \"10.0.0.1\""}', r'{"ip": "say \"[IP]\""}'),
        ('{"jane@example.com": 1}', '{"[EMAIL]": 1}'),
        ('{"phone": "4155552671", "n": "4155552671"}', '{"phone": "[PHONE]", "n": "4155552671"}'),
        ('{"version": "1.2.3.4"}', '{"version": "1.2.3.4"}'),
        ('["4111 1111", "1111 1111"]', '["4111 1111", "1111 1111"]'),
        ('["jane", "@example.com"]', '["jane", "@example.com"]'),
        ('"jane@example.com"', '"[EMAIL]"'),
        (f"[4111111111111111{' ' * 99}]", f'["[CARD]"{" " * 99}]'),
        ('{"a": "\\uff14111 1111 1111 1111"}', '{"a": "[CARD]"}'),
        ('{"a": "jane@example.com', '{"a": "[EMAIL]'),
        (r'{"a": "b\u00', r'{"a": "b\u00'),
    ],
)
def test_strings_are_decoded_redacted_and_encoded(text: str, redacted: str | None) -> None:
    """Escapes hide nothing and stay whole, and nothing is found across two strings."""
    if redacted is None:
        assert json.loads(screened(text)) == {"a": "[EMAIL]", "b": "caf\u00e9 \U0001f600 /"}
    else:
        assert screened(text) == redacted


def test_numbers_become_strings_or_stay_by_the_schema() -> None:
    """A number that is personal data becomes a string, but stays where there is a schema."""
    text = '{"card": 4111111111111111,\n "phone": 4155552671, "n": [-1.5e3, 4111111111111112]}'
    redacted = '{"card": "[CARD]",\n "phone": "[PHONE]", "n": [-1.5e3, 4111111111111112]}'
    assert screened(text) == redacted
    assert screened(text, SCHEMA) == text
    call = f'<tool_call>{{"name": "f", "arguments": {text}}}</tool_call>'
    assert screened(call, None, trigger=HERMES) == call
    assert screened("-4111111111111111") == '"-[CARD]"'
    # Without a grammar the answer is a text, which may quote JSON.
    assert screened('"card": 4111111111111111', RegexGrammar(".*")) == '"card": [CARD]'


def test_an_answer_beside_tools_stays_json() -> None:
    """An answer that may be JSON or a call is screened as JSON, in the one case and the other."""
    said = '{"card": 4111111111111111, "to": "jane@example.com"}'
    redacted = '{"card": 4111111111111111, "to": "[EMAIL]"}'
    assert screened(said, SCHEMA, trigger=HERMES) == redacted
    called = f'<tool_call>\n{{"name": "f", "arguments": {said}}}\n</tool_call>'
    assert screened(called, SCHEMA, trigger=HERMES) == called.replace(said, redacted)


def test_calls_of_tools_stay_json() -> None:
    """Text around calls is redacted as text, and arguments as JSON, in both forms of calls."""
    arguments = r'{"to": "a\njane\u0040example.com", "n": 4111111111111111}'
    clean = r'{"to": "a\n[EMAIL]", "n": 4111111111111111}'
    for trigger, form in (
        (HERMES, '<tool_call>\n{{"name": "f", "arguments": {}}}\n</tool_call>'),
        (LLAMA, '{{"name": "f", "parameters": {}}}'),
    ):
        text = f"To jane@example.com: {form} and {form}, card 4111111111111111"
        expected = f"To [EMAIL]: {form} and {form}, card [CARD]"
        found = screened(text.format(arguments, arguments), None, trigger=trigger)
        assert found == expected.format(clean, clean)
    plain = r"<tool_call> is no call, C:\dir, 4111111111111111 <tool_"
    assert screened(plain, None, trigger=HERMES) == plain.replace("4111111111111111", "[CARD]")


@pytest.mark.parametrize(
    "text",
    [
        "Sorry, mail jane@example.com or call +44 20 7946 0958.",
        '{to: jane@example.com, "b": 10.0.0.1 }',
        '{"a": x4 4111 1111 1111 1111, "b": "unclosed jane@example.com',
        'jane@example.com"jane@example.com',
    ],
)
def test_what_is_no_json_is_redacted_too(text: str) -> None:
    """An answer that should have been JSON, and is not, still loses its personal data."""
    for grammar, trigger in ((ANY_OBJECT, None), (SCHEMA, None), (None, '{"'), (None, "Sorry")):
        found = screened(text, grammar, trigger=trigger)
        assert "jane" not in found
        assert "7946" not in found
        assert "10.0" not in found
        assert "4111 1111" not in found


def test_escapes_hide_nothing_from_the_other_filters() -> None:
    """Blocked patterns, template tokens and control characters are found behind escapes."""
    rules = OutputSettings(blocked_patterns=["(?i)forbidden", '"x": 1'])
    screening = Screening(PiiSettings(), rules, Metrics())
    for trigger, grammar in ((None, ANY_OBJECT), ('{"a', None)):
        for text, passed in (
            (r'{"a": "is forb\u0069dden", "b": 1}', '{"a": "is '),
            (r'{"a": "<|im_end|\u003e\u001b\u202e ok\ud800"}', '{"a": " ok"}'),
            ('{"a": 2, "x": 1}', '{"a": 2, '),
        ):
            assert screened(text, grammar, trigger=trigger, screening=screening) == passed


def test_an_answer_without_a_find_is_as_it_was() -> None:
    """JSON with the usual escapes passes unchanged, so that its token ids can be kept."""
    text = '{"a": "x \\"y\\" \\\\ \\n\\t \u00e9 \U0001f600", "b": [1, 2.5, true, null, {}]}\n'
    screen = REDACTING.answer(TOKENS, ANY_OBJECT)
    assert screen.feed(text) + screen.flush() == text
    assert not screen.changed
    idle = Screening(PiiSettings(), OutputSettings(), Metrics())
    unusual = r'{"a": "caf\u00e9 \/ \ud83d"}'
    assert screened(unusual, screening=idle) == unusual


def test_text_flows() -> None:
    """A string is passed on as it comes, but for what may become personal data."""
    screen = REDACTING.answer(TOKENS, ANY_OBJECT)
    for piece in ('{"a', '": "', "Hello, ", "it is \\n", "so. ", '",\n', ' "b": ', "true, ", "["):
        screen.feed(piece)
    assert screen.feed('"is, ') == '"is, '
    assert screen.feed("jane@exa") == ""
    assert screen.feed('mple.com"') == '[EMAIL]"'


STRINGS = [
    *("jane@example.com", "+44 20 7946 0958", "4111 1111 1111 1111", "caf\u00e9", "\U0001f600", ""),
    *('"', "\\", "\n", "\u2028", "/", " ", "text", "020 7946 0958", "10.0.0.1", "\uff14", "{", "]"),
]
NUMBERS = [0, -1, 2.5, 1e300, 4111111111111111, 4111111111111112, 10**70, True, None]


def value(rng: random.Random, depth: int = 0) -> Any:
    """A random JSON value."""
    kind = rng.randrange(4 if depth < 3 else 2)
    if kind == 0:
        return "".join(rng.choices(STRINGS, k=rng.randrange(4)))
    if kind == 1:
        return rng.choice(NUMBERS)
    members = [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return members if kind == 2 else {f"k{n}": member for n, member in enumerate(members)}


def redacted(found: Any, *, numbers: bool) -> Any:
    """A value in which each string is redacted, and each number that is personal data."""
    if isinstance(found, str):
        return SCANNER.redact(found)[0]
    if isinstance(found, list):
        return [redacted(member, numbers=numbers) for member in found]
    if isinstance(found, dict):
        return {name: redacted(member, numbers=numbers) for name, member in found.items()}
    return "[CARD]" if numbers and found == 4111111111111111 else found


@pytest.mark.no_cover
@pytest.mark.parametrize("grammar", [ANY_OBJECT, SCHEMA])
def test_any_json_stays_json(grammar: Grammar) -> None:
    """Random values are valid after screening, each string as if it had been alone."""
    rng = random.Random(11)
    for _ in range(150):
        original = value(rng)
        text = json.dumps(
            original, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, None, 2])
        )
        found = json.loads(screened(text, grammar))
        assert found == redacted(original, numbers=grammar == ANY_OBJECT), text


@pytest.mark.no_cover
@pytest.mark.parametrize(
    "unit",
    ['"', "\\", r"\u0040", r"\ud83d", "{", "1", "1 ", "1" + " " * 999, "[[", '"a":', "{<c>{"],
)
@pytest.mark.parametrize(("grammar", "trigger"), [(ANY_OBJECT, None), (None, "<c>")])
def test_hostile_text_costs_linear_time(
    unit: str, grammar: Grammar | None, trigger: str | None
) -> None:
    """The time for adversarial characters in pieces is linear in their number."""

    def run(text: str) -> None:
        screen = REDACTING.answer(TOKENS, grammar, trigger)
        for at in range(0, len(text), 50):
            screen.feed(text[at : at + 50])
        screen.flush()

    assert is_linear(run, unit)
