"""The section ``state`` of the settings."""

from typing import Literal

from pydantic import Field, SecretStr

from app.core.config.base import Section


class StateSettings(Section):
    """Where rate limits, sessions, idempotency keys, usage and kept answers are."""

    backend: Literal["memory", "redis"] = Field(
        "memory",
        description="memory: in this process; redis: shared by every copy of the service that "
        "names the same server.",
    )
    url: SecretStr = Field(
        SecretStr("redis://localhost:6379/0"),
        description="Redis server: redis://, rediss:// or unix://, with its password; never shown.",
    )
    prefix: str = Field(
        "llm",
        pattern=r"^[\w.-]{1,64}$",
        description="Beginning of each key; copies that are to share state have the same.",
    )
    timeout_seconds: float = Field(
        0.25, gt=0, le=60, description="Time for Redis to answer; past it Redis counts as away."
    )
    connections: int = Field(
        64, ge=1, le=10_000, description="Most connections to Redis; further calls wait for one."
    )
    session_lease_seconds: float = Field(
        15.0,
        ge=1,
        le=3600,
        description="A session or idempotency key in use is free again this long after its "
        "replica was killed.",
    )
