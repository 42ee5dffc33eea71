"""The section ``security`` of the settings: API keys, limits of requests, trusted proxies."""

import hashlib
import ipaddress
from collections import Counter
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, SecretStr, StringConstraints, field_validator, model_validator

from app.core.config.base import Section

DEFAULT_API_KEY = "change-me-in-env"
DEFAULT_KEY_NAME = "default"
PRODUCTION_KEY_MIN_CHARS = 32
HEADER_BLANKS = " \t"
"""Around a header's value these are no part of it."""

_ORIGIN = r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$"

Scope = Literal["infer", "metrics", "admin"]
"""What a key permits: generating, scraping /metrics, reading the usage of all keys."""


class NamedKey(Section):
    """An API key with a name, given as text or as its digest."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[\w.-]+$")
    key: Annotated[SecretStr, Field(min_length=1)] | None = None
    digest: Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    scopes: list[Scope] = Field(default=["infer"], min_length=1)
    daily_tokens: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None
    max_concurrent: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        if (self.key is None) == (self.digest is None):
            raise ValueError("needs either key or digest (sha256: and 64 hexadecimal digits)")
        return self

    @property
    def sha256(self) -> bytes:
        """The key's SHA-256 digest."""
        if self.key is not None:
            return digest_of(self.key.get_secret_value())
        return bytes.fromhex(str(self.digest).removeprefix("sha256:"))

    @property
    def is_weak(self) -> bool:
        """Whether it is the default key or too short; the length of a digest's key is not known."""
        if self.sha256 in (digest_of(DEFAULT_API_KEY), digest_of("")):
            return True
        return self.key is not None and len(self.key) < PRODUCTION_KEY_MIN_CHARS


class SecuritySettings(Section):
    """API keys, limits of requests, and trusted proxies."""

    api_key: SecretStr = Field(
        SecretStr(DEFAULT_API_KEY),
        min_length=1,
        description="A key with all scopes; set it in the environment. Its default is accepted "
        "only while api_keys is empty.",
    )
    api_keys: list[NamedKey] = Field(
        default_factory=list,
        description="Further keys, each {name, key}, or {name, digest} with sha256: and the key's "
        "SHA-256 in hexadecimal; scopes (infer, metrics, admin; default: infer) says what it "
        "permits; daily_tokens and tokens_per_minute bound its prompt and completion tokens by day "
        "(UTC) and minute, max_concurrent the answers generated for it at once.",
    )
    max_prompt_chars: int = Field(
        4000, ge=1, le=10_000_000, description="Most characters in a prompt or in all messages."
    )
    max_body_bytes: int = Field(
        1_048_576, ge=1024, le=1_073_741_824, description="Largest request body."
    )
    trusted_proxies: list[str] = Field(
        default_factory=list,
        description="Addresses or networks whose X-Forwarded-For is believed.",
    )

    cors_origins: list[Annotated[str, StringConstraints(pattern=_ORIGIN)]] = Field(
        default_factory=list,
        description="Origins whose pages may call the service from a browser, such as "
        "https://app.example.com; * is any.",
    )

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, networks: list[str]) -> list[str]:
        for network in networks:
            ipaddress.ip_network(network, strict=False)
        return networks

    @model_validator(mode="after")
    def _keys_are_distinct(self) -> Self:
        names = Counter([DEFAULT_KEY_NAME, *(key.name for key in self.api_keys)])
        if repeated := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"api_keys: two keys have the name {repeated[0]}")
        keys = Counter(key.sha256 for key in self.accepted_keys)
        if any(count > 1 for count in keys.values()):
            raise ValueError("api_keys: two names have the same key")
        return self

    @model_validator(mode="after")
    def _keys_can_be_sent(self) -> Self:
        texts = [key.key.get_secret_value() for key in self.accepted_keys if key.key]
        if any(text != text.strip(HEADER_BLANKS) for text in texts):
            raise ValueError("a key begins or ends with a blank, which no header can carry")
        return self

    @property
    def accepted_keys(self) -> list[NamedKey]:
        """All accepted keys, ``api_key`` first.

        The default ``api_key`` is public, so it is accepted only while ``api_keys`` is empty.
        """
        if self.api_keys and self.api_key.get_secret_value() == DEFAULT_API_KEY:
            return self.api_keys
        own = NamedKey(name=DEFAULT_KEY_NAME, key=self.api_key, scopes=list(get_args(Scope)))
        return [own, *self.api_keys]


def digest_of(key: str) -> bytes:
    """The SHA-256 of a key's UTF-8."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
