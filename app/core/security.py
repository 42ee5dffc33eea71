"""API keys: who a request comes from."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from app.core.config import SecuritySettings
from app.utils.errors import InvalidAPIKeyError


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller that sent a valid key.

    Attributes:
        name: The key's name in the configuration; ``default`` for ``security.api_key``.
        key_id: First 16 hexadecimal digits of the key's SHA-256. Owns sessions, cached answers
            and rate-limit buckets, so that these survive a rename of the key.
    """

    name: str
    key_id: str


class KeyRing:
    """The keys this service accepts, kept as SHA-256 digests."""

    def __init__(self, settings: SecuritySettings) -> None:
        keys = {"default": settings.api_key, **{k.name: k.key for k in settings.api_keys}}
        self._principals = {
            digest: Principal(name=name, key_id=digest.hex()[:16])
            for name, key in keys.items()
            for digest in [_digest(key.get_secret_value())]
        }

    def authenticate(self, headers: Mapping[str, str]) -> Principal:
        """The caller behind a request's headers.

        Every key is compared, each in constant time, so that timing tells nothing about which
        one was close.

        Raises:
            InvalidAPIKeyError: No key was sent, or none that is known.
        """
        presented = _presented_key(headers)
        if presented is None:
            raise InvalidAPIKeyError
        digest = _digest(presented)
        found: Principal | None = None
        for known, principal in self._principals.items():
            if hmac.compare_digest(known, digest):
                found = principal
        if found is None:
            raise InvalidAPIKeyError
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _presented_key(headers: Mapping[str, str]) -> str | None:
    """The key in ``X-API-Key``, else in ``Authorization: Bearer``."""
    if key := headers.get("x-api-key"):
        return key
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
