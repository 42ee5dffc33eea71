"""Reads the bodies of requests: unpacks them, and parses their JSON."""

import zlib
from codecs import BOM_UTF8
from typing import Any, Final

from pydantic_core import from_json

from app.utils.errors import BodyTooLargeError, InvalidJSONError

# zlib's number for the format of gzip, with the largest window.
_GZIP: Final = 16 + zlib.MAX_WBITS


def unpack(body: bytes, encoding: str, max_bytes: int) -> bytes:
    """A body as it was before its ``Content-Encoding``.

    Raises:
        BodyTooLargeError: It is over ``max_bytes`` then.
        InvalidJSONError: It is not gzip, or has another encoding.
    """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in ("gzip", "x-gzip"):
        raise InvalidJSONError("The request body's Content-Encoding is neither gzip nor identity.")
    # A format of several packed parts (RFC 1952, 2.2) would let a small body cost much work.
    part = zlib.decompressobj(_GZIP)
    try:
        unpacked = part.decompress(body, max_bytes + 1)
    except zlib.error:
        raise InvalidJSONError("The request body is not gzip.") from None
    if len(unpacked) > max_bytes:
        raise BodyTooLargeError(max_bytes)
    if not part.eof or part.unused_data:
        raise InvalidJSONError("The request body's gzip breaks off, or has more than one part.")
    return unpacked


def parse_json(body: bytes) -> Any:
    """Parse a request body; a byte order mark before it is skipped.

    Raises:
        InvalidJSONError: It is malformed or not UTF-8, has a lone surrogate, NaN, an infinity or
            a number of too many digits, or is nested too deeply. The message says where.
    """
    try:
        return from_json(body.removeprefix(BOM_UTF8), allow_inf_nan=False)
    except (ValueError, RecursionError) as error:
        # The parser's message has a position and no text of the body.
        raise InvalidJSONError(f"The request body is not valid JSON: {error}.") from None
