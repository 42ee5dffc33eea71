"""How vocabularies spell the bytes of their tokens.

Byte-level BPE has an alphabet of one character for each byte: a printable byte of Latin-1 is
written as its own character, the others as U+0100 and onwards, in order (GPT-2's encoder; Radford
et al., 2019). SentencePiece writes text, with U+2581 for a space.
"""

import re
from collections.abc import Callable
from typing import Final

from tokenizers import Tokenizer

# SentencePiece vocabularies have such a token for each byte, for characters that they lack.
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def _alphabet() -> dict[str, int]:
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF: Final = _alphabet()
"""The byte that each character stands for."""


def spell_byte_level(token: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary."""
    # A special token may contain characters outside the alphabet: it stands for its own text.
    return bytes(BYTE_OF[c] for c in token) if BYTE_OF.keys() >= set(token) else token.encode()


def spell_piece(token: str) -> bytes:
    """The bytes of a token of a SentencePiece vocabulary."""
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(byte[1])
    return token.replace("\u2581", " ").encode()


def token_bytes(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """What returns the bytes of one token; none for an id that only pads the embeddings."""
    added = {i: t.content.encode() for i, t in tokenizer.get_added_tokens_decoder().items()}
    spell = spell_byte_level if "ByteLevel" in decoder_kinds(tokenizer) else spell_piece

    def bytes_of(token_id: int) -> bytes:
        if token_id in added:
            return added[token_id]
        return spell(tokenizer.id_to_token(token_id) or "")

    return bytes_of


def decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    """The kinds of the parts of a tokenizer's decoder, as tokenizer.json names them."""
    described = tokenizer.decoder.__getstate__() if tokenizer.decoder else b""
    return set(re.findall(r'"type":"(\w+)"', described.decode()))
