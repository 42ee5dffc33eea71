"""The alphabet in which vocabularies of byte-level BPE are written: a character for each byte."""

from typing import Final


def _alphabet() -> dict[str, int]:
    """Printable bytes of Latin-1 stand for themselves, the others follow U+0100 in order.

    Radford et al., 2019: GPT-2's encoder.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF: Final = _alphabet()
"""The byte that a character stands for."""
