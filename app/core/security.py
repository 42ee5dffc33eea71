"""API keys: who a request comes from, and what that caller may do."""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from app.core.config.security import Scope, SecuritySettings, digest_of
from app.utils.errors import InsufficientScopeError, InvalidAPIKeyError


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller that sent a valid key.

    Attributes:
        name: The key's name in the configuration; ``default`` for ``security.api_key``.
        key_id: First 16 hexadecimal digits of the key's SHA-256. Owns sessions, cached answers
            and rate-limit buckets, so that these survive a rename of the key.
        scopes: What the key is for.
        daily_tokens: Most tokens in a day, or ``None``.
    """

    name: str
    key_id: str
    scopes: frozenset[Scope]
    daily_tokens: int | None = None

    def require(self, scope: Scope) -> None:
        """Refuse a key that is not for this.

        Raises:
            InsufficientScopeError: It is not.
        """
        if scope not in self.scopes:
            raise InsufficientScopeError(scope)


class KeyRing:
    """The keys this service accepts, kept as SHA-256 digests."""

    def __init__(self, settings: SecuritySettings) -> None:
        self.replace(settings)

    def replace(self, settings: SecuritySettings) -> None:
        """Accept these keys from now on, and no others."""
        self._principals = {
            key.sha256: Principal(
                name=key.name,
                key_id=key.sha256.hex()[:16],
                scopes=frozenset(key.scopes),
                daily_tokens=key.daily_tokens,
            )
            for key in settings.accepted_keys
        }
        self._by_id = {caller.key_id: caller for caller in self._principals.values()}

    @property
    def principals(self) -> list[Principal]:
        """Everybody who is let in, in the order of the configuration."""
        return list(self._principals.values())

    def find(self, key_id: str) -> Principal | None:
        """The caller of an id, while its key is accepted."""
        return self._by_id.get(key_id)

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
        digest = digest_of(presented)
        found: Principal | None = None
        for known, principal in self._principals.items():
            if hmac.compare_digest(known, digest):
                found = principal
        if found is None:
            raise InvalidAPIKeyError
        return found


def _presented_key(headers: Mapping[str, str]) -> str | None:
    """The key in ``X-API-Key``, else in ``Authorization: Bearer``."""
    if key := headers.get("x-api-key"):
        return key
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
