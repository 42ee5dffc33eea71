"""Settings of the engine process."""

from pydantic import Field

from app.core.config.base import Section


class EngineSettings(Section):
    """Limits of the engine process."""

    max_running: int = Field(
        32, ge=1, le=1024, description="Requests generated at once, in one batch."
    )
    max_waiting: int = Field(
        128,
        ge=0,
        le=100_000,
        description="Requests that may wait, the last eighth for callers that hold no place; "
        "past that, 503 at once.",
    )
    queue_timeout_seconds: float = Field(
        60.0, gt=0, le=86_400, description="Longest a request may wait to begin; past that, 503."
    )
    request_timeout_seconds: float = Field(
        300.0, gt=0, le=86_400, description="Longest a request may take, waiting included."
    )
    step_timeout_seconds: float = Field(
        300.0,
        gt=0,
        le=86_400,
        description="Longest that a step may take; past that, the engine process starts again.",
    )
    load_timeout_seconds: float = Field(
        1800.0,
        gt=0,
        le=86_400,
        description="Longest that loading may take, downloads aside; past that, the service ends.",
    )
    stall_timeout_seconds: float = Field(
        15.0,
        ge=1,
        le=86_400,
        description="Longest that the engine process may be stopped, or with work neither run "
        "nor wait for a processor.",
    )
    max_restarts: int = Field(
        5,
        ge=0,
        le=1_000_000,
        description="Restarts of the engine process within ten minutes; at the next death the "
        "service ends.",
    )
    echo_step_seconds: float = Field(
        0.0, ge=0, le=2, description="Time the echo engine takes for a token; for load tests."
    )
