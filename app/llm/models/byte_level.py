"""The alphabet of byte-level BPE vocabularies: one character for each byte.

A printable byte of Latin-1 is written as its own character, the others as U+0100 and onwards, in
order (GPT-2's encoder; Radford et al., 2019).
"""

from typing import Final


def _alphabet() -> dict[str, int]:
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF: Final = _alphabet()
"""The byte that each character stands for."""
