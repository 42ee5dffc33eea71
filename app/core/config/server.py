"""The settings of connections."""

from pydantic import Field

from app.core.config.base import Section


class ServerSettings(Section):
    """The timeouts and the bounds of connections."""

    header_timeout_seconds: float = Field(
        5.0, gt=0, le=3600, description="Time for a request's head to arrive."
    )
    body_timeout_seconds: float = Field(
        8.0,
        gt=0,
        le=3600,
        description="Time for a body to arrive, plus a second for each 16 KiB of it.",
    )
    send_timeout_seconds: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="A client that takes nothing of its answer for this long is dropped.",
    )
    keep_alive_seconds: float = Field(
        5.0,
        gt=0,
        le=3600,
        description="How long an idle connection is kept; set more than a "
        "proxy's own keep-alive time.",
    )
    max_connections: int = Field(
        2048,
        ge=1,
        le=1_000_000,
        description="Most open connections; past that, the one that has waited longest is closed "
        "for a new one.",
    )
    max_connections_per_ip: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Most open connections of one address (IPv6: of a /64 network); trusted "
        "proxies are exempt.",
    )

    @property
    def shortest_timeout(self) -> float:
        """The shortest of the times, in seconds."""
        return min(
            self.header_timeout_seconds,
            self.body_timeout_seconds,
            self.send_timeout_seconds,
            self.keep_alive_seconds,
        )
