"""The settings of connections."""

from pydantic import Field

from app.core.config.base import Section


class ServerSettings(Section):
    """How long connections may take, and how many there may be."""

    header_timeout_seconds: float = Field(
        5.0, gt=0, le=3600, description="Longest the head of a request may take to come."
    )
    body_timeout_seconds: float = Field(
        8.0,
        gt=0,
        le=3600,
        description="Longest a body may take to come, and a second more for each 16 KiB of it.",
    )
    send_timeout_seconds: float = Field(
        30.0, gt=0, le=3600, description="Longest a client may take nothing of what is sent to it."
    )
    keep_alive_seconds: float = Field(
        5.0,
        gt=0,
        le=3600,
        description="How long an idle connection is kept for the next request; behind a proxy, "
        "more than the proxy keeps its own.",
    )
    max_connections: int = Field(
        2048,
        ge=1,
        le=1_000_000,
        description="Most open connections; past that, the one that has waited longest makes room.",
    )
    max_connections_per_ip: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Most open connections of an address (IPv6: of a /64 network); trusted "
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
