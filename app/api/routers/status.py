"""GET /status: what is served, how full it is, and which limits are in force."""

import time
from dataclasses import asdict

from fastapi import APIRouter

from app import __version__
from app.api.dependencies import AppServices, Services
from app.api.openai.routes import supported_parameters
from app.api.schemas import (
    CacheStatus,
    EngineStatus,
    LimitsStatus,
    ModelStatus,
    QueueStatus,
    SessionsStatus,
    StatusResponse,
)
from app.llm.client.client import EngineState

router = APIRouter(tags=["health"])


@router.get("/status", summary="What is served, how full it is, which limits hold")
async def status(services: AppServices) -> StatusResponse:
    """Detailed status with cache statistics. Reads what is known; never asks the engine."""
    settings = services.settings
    history = settings.chat_history
    return StatusResponse(
        name=settings.app.name,
        version=__version__,
        environment=settings.app.environment,
        uptime_seconds=round(time.monotonic() - services.started, 3),
        model=ModelStatus(
            name=services.engine.model_label,
            source=settings.model.source,
            revision=services.engine.info.revision if services.engine.info else None,
            sampling=services.generation.default_sampling(),
        ),
        engine=_engine(services),
        cache=CacheStatus(
            enabled=settings.cache.enabled,
            ttl_seconds=settings.cache.ttl_seconds,
            **services.state.answers.statistics(),
        ),
        sessions=SessionsStatus(
            enabled=history.enabled,
            active=len(services.state.sessions),
            max_sessions=history.max_sessions,
            ttl_seconds=history.ttl_seconds,
        ),
        limits=_limits(services),
    )


def _engine(services: Services) -> EngineStatus:
    engine = services.engine
    info = engine.info
    ready = engine.state is EngineState.READY
    queue = QueueStatus(
        kv_cache_usage=engine.stats.kv_cache_usage, **asdict(engine.queue.snapshot())
    )
    known = (
        {
            "backend": info.backend,
            "backend_reason": info.backend_reason,
            "device": info.device,
            "dtype": info.dtype,
            "context_length": info.context_length,
            "supported_parameters": supported_parameters(services),
        }
        if info
        else {}
    )
    return EngineStatus(
        state=engine.state,
        message=None if ready else engine.stage.text,
        restarts=engine.restarts,
        last_end=engine.last_end,
        queue=queue,
        **known,
    )


def _limits(services: Services) -> LimitsStatus:
    settings = services.settings
    limit = settings.rate_limit
    return LimitsStatus(
        max_tokens=settings.model.max_tokens,
        max_prompt_chars=settings.security.max_prompt_chars,
        max_body_bytes=settings.security.max_body_bytes,
        queue_timeout_seconds=settings.engine.queue_timeout_seconds,
        request_timeout_seconds=settings.engine.request_timeout_seconds,
        rate_limit_enabled=limit.enabled,
        requests_per_minute=limit.requests_per_minute,
        burst_size=limit.burst_size or limit.requests_per_minute,
    )
