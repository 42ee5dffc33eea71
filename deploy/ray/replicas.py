"""The service as replicas of Ray Serve, on a Ray cluster that exists: docs/scaling.md.

``build`` makes the application that deploy/ray/serve.yml names.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field
from ray import serve
from ray.serve import Application

from app.api.dependencies import Services
from app.core.config import load_settings
from app.core.logging import get_logger
from app.llm.client.client import EngineState
from app.main import create_app
from app.utils.errors import ConfigurationError

log = get_logger("ray")

_LOOK_SECONDS = 0.1
# Serve ends a replica by force this long after its requests should have ended.
_LAST_SECONDS = 5.0
_TAKEN_AWAY = (
    "Ray Serve's proxy stands before the service: server.* bounds no connections, each token costs "
    "more, and /readyz, /status and /metrics are those of any one replica"
)


class Scale(BaseModel, extra="forbid"):
    """How many replicas there are, and what Ray sets aside for each.

    Attributes:
        target_requests: Requests of a replica past which another is added; default: half of
            ``engine.max_running``.
        cpus: Logical processors; the engine uses as many threads.
    """

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_requests: float | None = Field(None, gt=0)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)


def build(scale: Scale) -> Application:
    """The application for Serve; the settings are those of the service.

    Raises:
        ConfigurationError: Several replicas would not share their state.
    """
    settings = load_settings()
    if scale.max_replicas > 1 and settings.state.backend == "memory":
        raise ConfigurationError(
            "configuration error: more than one replica needs state.backend redis, or each has its "
            "own sessions, limits and budgets"
        )
    deployment = serve.deployment(
        serve.ingress(_replica)(),
        name="llm-service",
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        autoscaling_config={
            "min_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.target_requests or settings.engine.max_running / 2,
        },
        # The service's own queue refuses what is too much, and says when to try again.
        max_ongoing_requests=settings.server.max_connections,
        graceful_shutdown_timeout_s=settings.app.shutdown_grace_seconds + _LAST_SECONDS,
    )
    return deployment.bind()


def _replica() -> FastAPI:
    """The service, whose start lasts until the model is loaded; Serve sends no request before."""
    app = create_app()
    log.warning(_TAKEN_AWAY)
    services: Services = app.state.services
    served = app.router.lifespan_context

    @asynccontextmanager
    async def until_ready(application: Any) -> AsyncIterator[Any]:
        # Serve's proxy listens elsewhere.
        application.address = None
        async with served(application) as state:
            # A model that cannot be loaded ends the process.
            while services.engine.state is not EngineState.READY:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(_LOOK_SECONDS)
            yield state

    app.router.lifespan_context = until_ready
    return app
