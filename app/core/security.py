"""API keys: authentication of callers, and the scopes of their keys."""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from app.core.config.security import HEADER_BLANKS, Scope, SecuritySettings, digest_of
from app.utils.errors import InsufficientScopeError, InvalidAPIKeyError


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller that sent a valid key.

    Attributes:
        key_id: The key's SHA-256 in hexadecimal. It identifies the owner of sessions, cached
            answers and rate-limit buckets, which a rename of the key keeps.
    """

    name: str
    key_id: str
    scopes: frozenset[Scope]
    daily_tokens: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None

    def require(self, scope: Scope) -> None:
        """Check that the key has a scope.

        Raises:
            InsufficientScopeError: It does not have it.
        """
        if scope not in self.scopes:
            raise InsufficientScopeError(scope)


class KeyRing:
    """The accepted API keys, stored as SHA-256 digests.

    Args:
        are_told: Whether metrics may name them; not where anybody can read the metrics.
    """

    def __init__(self, settings: SecuritySettings, *, are_told: bool = False) -> None:
        self._are_told = are_told
        self.replace(settings)

    def replace(self, settings: SecuritySettings) -> None:
        """Accept exactly the keys of ``settings`` from now on."""
        self._principals = {
            k.sha256: Principal(
                name=k.name,
                key_id=k.sha256.hex(),
                scopes=frozenset(k.scopes),
                daily_tokens=k.daily_tokens,
                tokens_per_minute=k.tokens_per_minute,
                max_concurrent=k.max_concurrent,
            )
            for k in settings.accepted_keys
        }
        self._by_id = {caller.key_id: caller for caller in self._principals.values()}

    @property
    def principals(self) -> list[Principal]:
        """The owners of all accepted keys, in the order of the configuration."""
        return list(self._principals.values())

    def find(self, key_id: str) -> Principal | None:
        """The owner of a key by its id; ``None`` when the key is not accepted any more."""
        return self._by_id.get(key_id)

    def label(self, key_id: str | None) -> str:
        """What metrics call a key by its id; all that are not accepted have one name."""
        principal = self._by_id.get(key_id or "") if self._are_told else None
        return principal.name if principal else "other"

    def authenticate(self, headers: Mapping[str, str]) -> Principal:
        """The owner of the key in a request's headers, whose names are in lower case.

        All keys are compared, each in constant time, so that the time taken tells nothing about
        which key was close.

        Raises:
            InvalidAPIKeyError: The headers have no key, or an unknown one.
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
    if key := _value(headers, "x-api-key"):
        return key
    scheme, _, token = _value(headers, "authorization").partition(" ")
    return token.strip(HEADER_BLANKS) or None if scheme.lower() == "bearer" else None


def _value(headers: Mapping[str, str], name: str) -> str:
    """A header's value; the blanks around it are no part of it (RFC 9110, 5.5)."""
    return headers.get(name, "").strip(HEADER_BLANKS)
