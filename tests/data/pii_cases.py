"""Short texts for the tests of the PII filter."""

from __future__ import annotations

# A kind, and a text that is an entity of that kind.
FOUND = [
    ("email", "jane.doe+news@mail.example.co.uk"),
    ("email", "o'brien@example.com"),
    ("email", "m\u00fcller@b\u00fccher.example"),
    ("email", "x@xn--bcher-kva.example"),
    ("email", f"{'a' * 64}@example.com"),
    ("email", f"j@{'.'.join(['a' * 60] * 4)}.example"),
    ("phone", "+14155552671"),
    ("phone", "+44 20 7946 0958"),
    ("phone", "+49 (0) 30 123456"),
    ("phone", "+380441234567"),
    ("phone", "(415) 555-2671"),
    ("phone", "(415)555.2671"),
    ("phone", "415-555-2671"),
    ("phone", "415.555.2671"),
    ("phone", "415 555 2671"),
    ("phone", "415 555-2671"),
    ("phone", "1-415-555-2671"),
    ("phone", "415\u2011555\u20112671"),
    ("phone", "123-456-7890"),
    ("ssn", "078-05-1120"),
    ("ssn", "899-99-9999"),
    ("ssn", "001 01 0001"),
    ("card", "4222222222222"),
    ("card", "4111111111111111"),
    ("card", "4111 1111 1111 1111"),
    ("card", "5555-5555-5555-4444"),
    ("card", "3782 822463 10005"),
    ("card", "30569309025904"),
    ("card", "6011111111111117"),
    ("card", "3530111333300000"),
    ("card", "2223000048400011"),
    ("card", "6304 0000 0000 0000"),
    ("iban", "DE89 3704 0044 0532 0130 00"),
    ("iban", "DE89370400440532013000"),
    ("iban", "gb29nwbk60161331926819"),
    ("iban", "NO93 8601 1117 947"),
    ("iban", "MT84 MALT 0110 0001 2345 MTLC AST0 01S"),
    ("ip", "10.0.0.1"),
    ("ip", "255.255.255.255"),
    ("ip", "2001:db8::1"),
    ("ip", "fe80::1"),
    ("ip", "2001:0db8:0000:0000:0000:ff00:0042:8329"),
    ("ip", "::ffff:192.0.2.128"),
]

NOT_FOUND = [
    "jane@localhost",
    "jane@example.c",
    "@example.com",
    f"jane@{'a' * 64}.com",
    f"jane@{'a.' * 130}com",
    "package@1.2.3-rc.next",
    "icon@2x.png",
    "a@b.transpose()",
    "git@github.com:owner/repo.git",
    "+1234567",
    "+1 415 555 267",
    "+1234567890123456",
    "2+12345678901",
    "911-555-2671",
    "015-555-2671",
    "100 200 3000",
    "277.764 1035",
    "12-415-555-2671",
    "415-555-26712",
    "$415-555-2671",
    "4155552671",
    "000-12-3456",
    "666-12-3456",
    "900-12-3456",
    "999-12-3456",
    "123-00-4567",
    "123-45-0000",
    "123-45 6789",
    "123-45-67890",
    "078051120",
    "4111111111111112",
    "1111111111111117",
    "41111111111111111111",
    "4111 1111-1111 1111",
    "a4111111111111111",
    "0.4111111111111111",
    "4111-1111-1111-1111-2024",
    "DE89 3704 0044 0532 0130 01",
    "XX89 3704 0044 0532 0130 00",
    "DE89 3704 0044 0532 0130",
    "DE893704004405320130001",
    "256.1.1.1",
    "1.2.3",
    "1.2.3.4.5",
    "01.2.3.4",
    "version 1.2.3.4",
    "v1.2.3.4",
    "Chrome/120.0.0.0",
    "12:30:45",
    "00:1a:2b:3c:4d:5e",
    "00:11:22:33:44:55:66:77",
    "2001:db8::1::2",
    "std::vector",
    "x[::2]",
    "a::b",
    "::",
    "1:2:3:4:5:6:7:8:9",
]

SYMBOLS = "@ . .. - + ( ) : :: / # _ % ' = \" [ ] \n \t 0 7 12 555 1234 9999"
WORDS = (
    "a hello world version ssn tel phone git@ EMP-123456 EMP- project fin start aaab abbc xxy word!"
)
OTHERS = (
    "\u00e9|\u8054\u7cfb|\u00a0|\U0001f600|\ud83d|m\u00fc| |  |project x|Hello, |the quick brown "
)
PIECES = [
    *(value for _, value in FOUND),
    *NOT_FOUND,
    *SYMBOLS.split(" "),
    *WORDS.split(" "),
    *OTHERS.split("|"),
    " tel: 4155552671",
    "my ssn is 078051120",
]
LONG = ["a" * 70, "b." * 40, "1" * 25, "f:" * 30, "1." * 30, "x" * 330, '"' + "z" * 254, "1 " * 30]

# Each is repeated to 100,000 characters.
HOSTILE = [
    *("@", "a", "1", ".", "-", "+", ":", "(", "a@", "a@a.", "a@a.co ", "x.y@", "1.", "1-", "1 "),
    *("+1 ", "+49 30 123 ", "4444 ", "44444-", "415-555-", "(415) ", "f:", "1:", "::1 ", "AA11 "),
    *("4111 1111 1111 1112 ", "415 555 2671 ", "DE89 ", "1.1.1.1 ", "123456789 ", "ssn 123456789 "),
    *("\u00e9", "\U0001f6001@a.co", '"', "aaab", "project ", "EMP-1"),
]

# Patterns whose prefixes can be derived, and texts in which each pattern has a match.
SOURCES = [
    r"\bEMP-\d{6}\b",
    r"(?i)project\s+(falcon|eagle)",
    r"a+b|ab*c",
    r"(ab{2,3}){1,2}c?",
    r"[^a]x",
    r"(?:)ab",
    r"x{0}y",
    r"(?P<n>a)(?i:B)[a-f\d]$",
    r"a.c|q",
    r"[^\W\d]+\S\D",
]
MATCHING = ["EMP-123456", "PROJECT \n eagle", "aab", "abbc", "abbabbbc", "bx", "y", "aBf", "abc"]
