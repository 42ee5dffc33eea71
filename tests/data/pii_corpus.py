"""A corpus for the PII filter: sentences with known entities, and text that only looks like some.

Part is written by hand, part generated from a fixed seed. Values are generated from the formats'
own rules (ISO 7812, ISO 13616, NANP, E.164, RFC 4291), not from the filter's patterns. None of it
is anybody's data.
"""

from __future__ import annotations

import ipaddress
import random
import string
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise

SEED = 20240229


@dataclass(frozen=True)
class Sample:
    """A text, and the entities in it as pairs of kind and value."""

    text: str
    entities: tuple[tuple[str, str], ...] = ()


def positives(per_kind: int = 100) -> list[Sample]:
    """Texts with an entity or more: the hand-written ones and ``per_kind`` generated of each."""
    rng = random.Random(SEED)
    samples = [Sample(text, entities) for text, entities in HAND_WRITTEN]
    for kind, make in GENERATORS.items():
        for _ in range(per_kind):
            value = make(rng)
            samples.append(Sample(rng.choice(CONTEXTS).replace("{}", value), ((kind, value),)))
    return samples


def negatives(per_shape: int = 15) -> list[Sample]:
    """Texts with no entity: the hand-written ones and ``per_shape`` of each generated shape."""
    rng = random.Random(SEED + 1)
    samples = [Sample(text) for text in HAND_WRITTEN_NEGATIVES]
    for make in LOOKALIKES:
        samples.extend(Sample(rng.choice(PLAIN).replace("{}", make(rng))) for _ in range(per_shape))
    return samples


# The surroundings of a value: punctuation, markup, quotes, code and the end of the text.
CONTEXTS = (
    "{}",
    "It is {}.",
    "Use {}, please.",
    "I moved; the new one is {}!",
    "(see {})",
    'The record says "{}" and nothing else.',
    "**{}**",
    "`{}`",
    "- {}\n- something else",
    "| name | {} |\n| --- | --- |",
    '{"value": "{}", "ok": true}'.replace('{"', '{ "'),
    "name;{};2024",
    "Is it {}? I think so.",
    "\u201c{}\u201d, she wrote.",
    "value={}",
    "Contact:\n{}\nThank you",
    "my data: {} and that is all",
    "<td>{}</td>",
    "\u8fd9\u662f {} \u3002",
    "C'est {} \u00e9videmment",
)
PLAIN = (
    "{}",
    "It is {}.",
    "See {}, please.",
    "(see {})",
    'The log says "{}" here.',
    "`{}`",
    "- {}\n- something else",
    "ref {} was closed",
)

NAMES = "john jane maria o'brien li.wei anna-lena m\u00fcller jos\u00e9 x a_b support no-reply"
ENDINGS = ".doe _smith 42 +news .van.der.berg -k .m\u00fcller"
DOMAINS = (
    "example.com example.org mail.example.co.uk my-company.de sub.domain.example.net x.io uni.edu "
    "example.travel b\u00fccher.example xn--bcher-kva.example 3m.com a.b.c.example.info EXAMPLE.COM"
)
# An issuer's prefix and a length.
CARDS = (
    "4:16 4:16 4:13 4:19 51:16 55:16 2221:16 2720:16 34:15 37:15 36:14 3056:14 6011:16 65:16 "
    "3528:16 62:16 62:19 2200:16 6304:18 9792:16"
)
# A country, and its account's structure: n digits, a capitals, c either (the IBAN registry's).
IBANS = (
    "DE:18n GB:4a14n FR:10n11c2n ES:20n IT:1a10n12c NL:4a10n CH:5n12c AT:16n BE:12n NO:11n PL:24n "
    "SE:20n MT:4a5n18c SA:2n18c TR:6n16c AE:19n BR:23n1a1c IE:4a14n"
)


def _email(rng: random.Random) -> str:
    ending = rng.choice([*ENDINGS.split(), "", ""])
    return f"{rng.choice(NAMES.split())}{ending}@{rng.choice(DOMAINS.split())}"


def _numerals(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.digits, k=count))


def _phone(rng: random.Random) -> str:
    area = f"{rng.randint(2, 9)}{rng.choice('02345678')}{rng.randint(0, 9)}"
    exchange = f"{rng.randint(2, 9)}{rng.randint(0, 9)}{rng.choice('023456789')}"
    line = _numerals(rng, 4)
    north_american = (
        f"({area}) {exchange}-{line}",
        f"({area}){exchange}-{line}",
        f"{area}-{exchange}-{line}",
        f"{area}.{exchange}.{line}",
        f"{area} {exchange} {line}",
        f"1-{area}-{exchange}-{line}",
        f"+1 {area} {exchange} {line}",
        f"+1{area}{exchange}{line}",
        f"+1 ({area}) {exchange}-{line}",
        f"{area}\u2011{exchange}\u2011{line}",
    )
    international = (
        f"+44 20 {_numerals(rng, 4)} {_numerals(rng, 4)}",
        f"+49 30 {_numerals(rng, 6)}",
        f"+49 (0) 89 {_numerals(rng, 7)}",
        f"+33 6 {' '.join(_numerals(rng, 2) for _ in range(4))}",
        f"+3531{_numerals(rng, 7)}",
        f"+86 138 {_numerals(rng, 4)} {_numerals(rng, 4)}",
        f"+91-98{_numerals(rng, 3)}-{_numerals(rng, 5)}",
        f"+61 4{_numerals(rng, 2)} {_numerals(rng, 3)} {_numerals(rng, 3)}",
        f"+55 11 9{_numerals(rng, 4)}-{_numerals(rng, 4)}",
        f"+380{_numerals(rng, 9)}",
    )
    return rng.choice(north_american if rng.random() < 0.6 else international)


def _ssn(rng: random.Random) -> str:
    area = rng.choice([n for n in range(1, 900) if n != 666])
    gap = rng.choice("--- ")
    return f"{area:03}{gap}{rng.randint(1, 99):02}{gap}{rng.randint(1, 9999):04}"


def luhn_digit(number: str) -> str:
    """The digit that makes ``number`` pass Luhn's check."""
    total = 0
    for place, digit in enumerate(reversed(number)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return str(-total % 10)


def _card(rng: random.Random) -> str:
    prefix, _, digits = rng.choice(CARDS.split()).partition(":")
    length = int(digits)
    body = prefix + _numerals(rng, length - len(prefix) - 1)
    number = body + luhn_digit(body)
    gap = rng.choice(["", " ", "-", " "])
    cuts = {15: (4, 10), 14: (4, 10), 13: (4, 8), 16: (4, 8, 12)}.get(length, (4, 8, 12, 16))
    places = [0, *cuts, length]
    return gap.join(number[a:b] for a, b in pairwise(places))


def _iban(rng: random.Random) -> str:
    country, _, structure = rng.choice(IBANS.split()).partition(":")
    account, count = "", ""
    alphabets = {"n": string.digits, "a": string.ascii_uppercase}
    for symbol in structure:
        if symbol.isdigit():
            count += symbol
        else:
            letters = alphabets.get(symbol, string.digits + string.ascii_uppercase)
            account += "".join(rng.choices(letters, k=int(count)))
            count = ""
    value = int("".join(str(int(c, 36)) for c in f"{account}{country}00"))
    number = f"{country}{98 - value % 97:02}{account}"
    style = rng.random()
    if style < 0.5:
        return " ".join(number[i : i + 4] for i in range(0, len(number), 4))
    return number if style < 0.9 else number.lower()


def _ip(rng: random.Random) -> str:
    if rng.random() < 0.55:
        return str(ipaddress.IPv4Address(rng.getrandbits(32)))
    address = ipaddress.IPv6Address((0x20010DB8 << 96) | rng.getrandbits(96))
    hosts = (
        str(address),
        address.exploded,
        str(ipaddress.IPv6Address((0x20010DB8 << 96) | rng.getrandbits(16))),
        f"fe80::{rng.getrandbits(16):x}:{rng.getrandbits(16):x}",
        f"::ffff:{ipaddress.IPv4Address(rng.getrandbits(32))}",
        str(address).upper(),
    )
    return rng.choice(hosts)


GENERATORS: dict[str, Callable[[random.Random], str]] = {
    "email": _email,
    "phone": _phone,
    "ssn": _ssn,
    "card": _card,
    "iban": _iban,
    "ip": _ip,
}


def _hex(rng: random.Random, count: int) -> str:
    return f"{rng.getrandbits(4 * count):0{count}x}"


def _decimal_uuid(rng: random.Random) -> str:
    start, end = f"{_numerals(rng, 8)}-{_numerals(rng, 4)}", _numerals(rng, 12)
    return f"{start}-4{_numerals(rng, 3)}-8{_numerals(rng, 3)}-{end}"


def _moment(rng: random.Random) -> datetime:
    return datetime.fromtimestamp(rng.randint(0, 2**31), UTC)


def _bad_card(rng: random.Random) -> str:
    body = "4" + _numerals(rng, 14)
    return body + str((int(luhn_digit(body)) + rng.randint(1, 9)) % 10)


def _isbn13(rng: random.Random) -> str:
    body = f"978{_numerals(rng, 9)}"
    check = -sum(int(d) * (1 + 2 * (i % 2)) for i, d in enumerate(body)) % 10
    return f"ISBN {body[:3]}-{body[3]}-{body[4:7]}-{body[7:12]}-{check}"


def _imei(rng: random.Random) -> str:
    body = f"35{_numerals(rng, 12)}"
    return f"IMEI {body}{luhn_digit(body)}"


LOOKALIKES: tuple[Callable[[random.Random], str], ...] = (
    lambda r: str(uuid.UUID(int=r.getrandbits(128), version=4)),
    _decimal_uuid,
    lambda r: f"v{r.randint(0, 20)}.{r.randint(0, 99)}.{r.randint(0, 999)}",
    lambda r: (
        f"version {r.randint(0, 20)}.{r.randint(0, 99)}.{r.randint(0, 99)}.{r.randint(0, 99)}"
    ),
    lambda r: (
        f"package@{r.randint(0, 20)}.{r.randint(0, 99)}.{r.randint(0, 9)}-beta.{r.randint(0, 9)}"
    ),
    lambda r: f"{_moment(r):%Y-%m-%d}",
    lambda r: f"{_moment(r):%d.%m.%Y %H:%M:%S}",
    lambda r: _moment(r).isoformat(),
    lambda r: f"{_moment(r):%Y%m%d%H%M%S}",
    lambda r: str(1_600_000_000_000 + r.getrandbits(36)),
    lambda r: str(1_600_000_000 + r.getrandbits(26)),
    lambda r: f"ORD-{r.randint(2019, 2025)}-{_numerals(r, 6)}",
    lambda r: f"order {_numerals(r, 10)}",
    lambda r: f"order {_numerals(r, 16)}",  # About one in thirty is a valid card.
    lambda r: f"#{_numerals(r, 4)}-{_numerals(r, 4)}",
    lambda r: f"INV {r.randint(2019, 2025)}/{_numerals(r, 5)}",
    lambda r: _hex(r, 32),
    lambda r: _hex(r, 64),
    lambda r: _hex(r, 7),
    lambda r: ":".join(_hex(r, 2) for _ in range(6)),
    lambda r: ":".join(_hex(r, 2) for _ in range(16)),
    _bad_card,
    _isbn13,
    _imei,
    lambda r: f"0-{_numerals(r, 3)}-{_numerals(r, 5)}-{r.randint(0, 9)}",
    lambda r: f"${r.randint(1, 999)},{_numerals(r, 3)}.{_numerals(r, 2)}",
    lambda r: f"{_numerals(r, 5)}-{_numerals(r, 4)}",
    lambda r: f"9{_numerals(r, 2)}-{_numerals(r, 2)}-{_numerals(r, 4)}",
    lambda r: f"{_numerals(r, 2)}-{_numerals(r, 3)}-{_numerals(r, 4)}",
    lambda r: f"1Z{_hex(r, 6).upper()}{_numerals(r, 10)}",
    lambda r: f"{r.randint(256, 999)}.{r.randint(0, 255)}.{r.randint(0, 255)}.{r.randint(0, 255)}",
    lambda r: f"1.3.6.1.4.1.{r.randint(1, 9999)}.{r.randint(1, 9)}",
    lambda r: f"DE{r.randint(10, 96)} {' '.join(_numerals(r, 4) for _ in range(4))}",
    lambda r: f"{r.uniform(-90, 90):.6f}, {r.uniform(-180, 180):.6f}",
    lambda r: f"{r.randint(100, 999)} + {r.randint(10, 99)} = {r.randint(1000, 9999)}",
    lambda r: f"x[{r.randint(1, 9)}::{r.randint(1, 9)}]",
    lambda r: f"Chrome/{r.randint(80, 130)}.0.{r.randint(0, 255)}.{r.randint(0, 255)}",
    lambda r: f"{r.uniform(0, 10):.15f}",
)

Entities = tuple[tuple[str, str], ...]


def _one(kind: str, value: str, text: str) -> tuple[str, Entities]:
    return text.replace("{}", value), ((kind, value),)


# The last ones of each kind are hard; some of them are not found.
HAND_WRITTEN: tuple[tuple[str, Entities], ...] = (
    _one("email", "jane@example.com", "Mail me at {}, or don't."),
    _one("email", "jane.roe@example.com", "Thanks...{}"),
    _one("email", "jane@example.com", "<mailto:{}>"),
    _one("email", "jane@example.com", "\u8bf7\u8054\u7cfb{}\u8c22\u8c22"),
    _one("email", "jane@example.com", "jane@example.com".replace("jane@example.com", "{}:hunter2")),
    _one(
        "email",
        "\u0438\u0432\u0430\u043d@\u043f\u043e\u0447\u0442\u0430.\u0440\u0444",
        "\u041f\u0438\u0448\u0438\u0442\u0435 {}.",
    ),
    _one("email", '"jane roe"@example.com', "The odd but legal {} exists."),
    _one("email", "jane(home)@example.com", "A comment, {}, is legal too."),
    _one("phone", "555-123-4567", "Call {} now."),
    _one("phone", "123-456-7890", "Call {} now."),
    _one("phone", "4155552671", "My phone number is {}."),
    _one("phone", "14155552671", "tel:{}"),
    _one("phone", "(415) 555-2671", "Office {} ext. 12"),
    _one("phone", "+14155552671", "sms:{}?body=hi"),
    _one("phone", "415/555-2671", "Some write {} with a stroke."),
    _one("phone", "+1-800-FLOWERS", "Vanity numbers ({}) have letters."),
    _one("ssn", "078-05-1120", "The SSN is {}."),
    _one("ssn", "078051120", "SSN: {}"),
    _one("ssn", "078 05 1120", "Social Security {}"),
    _one("ssn", "078\u201105\u20111120", "Number {} on file"),
    _one("ssn", "078.05.1120", "With dots: {}"),
    _one("card", "4111 1111 1111 1111", "Charge {} 12/27 123."),
    _one("card", "378282246310005", "Amex {}"),
    _one("card", "5555-5555-5555-4444", "cc={}&cvv=123"),
    _one("card", "4111.1111.1111.1111", "With dots: {}"),
    _one("iban", "DE89 3704 0044 0532 0130 00", "Pay to {} TODAY"),
    _one("iban", "GB29NWBK60161331926819", "IBAN:{};"),
    _one("iban", "gb29 nwbk 6016 1331 9268 19", "In small letters {} with gaps"),
    _one("ip", "192.168.0.1", "http://{}:8080/index.html"),
    _one("ip", "10.0.0.0", "route {}/8"),
    _one("ip", "2001:db8::1", "http://[{}]:8080/"),
    _one("ip", "fe80::1", "ping {}%eth0"),
    _one("ip", "::1", "listening on {}"),
    (
        "jane@example.com called +44 20 7946 0958 from 10.1.2.3, card 4111111111111111.",
        (
            ("email", "jane@example.com"),
            ("phone", "+44 20 7946 0958"),
            ("ip", "10.1.2.3"),
            ("card", "4111111111111111"),
        ),
    ),
)

HAND_WRITTEN_NEGATIVES: tuple[str, ...] = (
    "def f(x): return x[::2] + x[1::3]",
    "std::vector<int>::iterator it = v.begin();",
    "use crate::abc::def; let y = face::bed(1);",
    "C = A @ B.T; D = a@b.transpose()",
    "@app.get('/v1') and @pytest.mark.parametrize",
    "git clone git@github.com:owner/repo.git",
    "npm install @types/node@18.19.0 react@18.2.0-rc.1",
    "<img src='logo@2x.png'> and icon@3x.jpg",
    "ssh root@localhost and user@host",
    "follow @jane or @bob_42 on it",
    "for i in 0..10 and 1...5 {}",
    "3.14159265358979 is pi and 2.718281828 is e",
    "the range 100-200, pages 123-456, sets 6-4 7-5",
    "12:30:45, 23:59, 1:2:3 and 12:34:56.789",
    "aspect 16:9, mix 1:2:3:4, odds 5:1",
    "$4,111.11 and EUR 1.234.567,89 and 1 234 567",
    "rgb(255, 255, 255) #ff00ff 0x1F4",
    "ISO 8601, RFC 5321, section 4.5.3.1",
    "release 10.0.1.2, build 1.2.3.4, v1.2.3.4",
    "Mozilla/5.0 (X11; Linux x86_64) Chrome/120.0.0.0 Safari/537.36",
    "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "call me at noon, or text at 12 30 to 45",
    "E = mc^2; a+1234567 - b+7654321 = 0",
    "000-12-3456, 666-12-3456, 123-00-4567, 123-45-0000",
    "1234 5678 9012 3456 and 4111 1111 1111 1112",
    "GB29 NWBK 6016 1331 9268 18 has a wrong check",
    "XX29 NWBK 6016 1331 9268 19 has no country",
    "999.1.2.3 and 1.2.3 and 1.2.3.4.5",
    "a::b, ::, [::1:], ::2",
    "(123) 45 and (1234) 567-8901",
)

OUT_OF_SCOPE: tuple[str, ...] = (
    "2123 4567",  # A national number of a region that is not configured.
    "4155552671",  # Ten digits without a word that names them.
    "078051120",  # Nine digits without such a word.
    "jane at example dot com",  # Spelt out to evade filters.
)
"""Forms that the filter does not find; the figures leave them out."""


def all_samples() -> Iterator[Sample]:
    """The whole corpus."""
    yield from positives()
    yield from negatives()
