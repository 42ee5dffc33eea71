"""How vocabularies spell the bytes of their tokens.

Byte-level BPE has an alphabet of one character for each byte: a printable byte of Latin-1 is
written as its own character, the others as U+0100 and onwards, in order (GPT-2's encoder; Radford
et al., 2019). SentencePiece writes text, with U+2581 for a space.
"""

import re
from typing import Final

# SentencePiece vocabularies have such a token for each byte, for characters that they lack.
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def _alphabet() -> dict[str, int]:
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF: Final = _alphabet()
"""The byte that each character stands for."""


def spell_piece(token: str) -> bytes:
    """The bytes of a token of a SentencePiece vocabulary."""
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(byte[1])
    return token.replace("\u2581", " ").encode()
