"""Is it alive, is it ready, what does it measure. None of these touches the engine."""

import asyncio
from typing import Literal

from fastapi import APIRouter, Request, Response

from app.api.dependencies import AppServices
from app.api.errors import responses
from app.api.guard import identify
from app.api.schemas import HealthResponse, ProbeResponse
from app.llm.client.client import EngineState
from app.utils.errors import InsufficientScopeError, InvalidAPIKeyError, RateLimitExceededError

router = APIRouter(tags=["health"])

Status = Literal["healthy", "loading", "unhealthy", "draining"]

_STATUS: dict[EngineState, Status] = {
    EngineState.READY: "healthy",
    EngineState.LOADING: "loading",
    EngineState.RESTARTING: "loading",
    EngineState.DRAINING: "draining",
    EngineState.FAILED: "unhealthy",
    EngineState.STOPPED: "unhealthy",
}


@router.head("/health", include_in_schema=False)
@router.get(
    "/health",
    summary="Is the model healthy",
    responses={503: {"description": "Not healthy", "model": HealthResponse}},
)
async def health(services: AppServices, response: Response) -> HealthResponse:
    """Service health and model status; 503 while loading, draining or unhealthy."""
    engine = services.engine
    status = _STATUS[engine.state]
    if status != "healthy":
        response.status_code = 503
    return HealthResponse(
        status=status,
        model_loaded=engine.state in (EngineState.READY, EngineState.DRAINING),
        model_name=engine.model_label,
    )


@router.head("/livez", include_in_schema=False)
@router.get("/livez", summary="Is the process alive")
async def livez() -> ProbeResponse:
    """Whether the process answers at all."""
    return ProbeResponse(status="alive")


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    summary="Would it take a request",
    responses={503: {"description": "Not ready", "model": ProbeResponse}},
)
async def readyz(services: AppServices, response: Response) -> ProbeResponse:
    """Whether requests would be taken; a full queue is no reason to send them elsewhere."""
    if services.engine.state is EngineState.READY:
        return ProbeResponse(status="ready")
    response.status_code = 503
    return ProbeResponse(status=_STATUS[services.engine.state])


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses=responses(InvalidAPIKeyError, InsufficientScopeError, RateLimitExceededError),
)
async def metrics(services: AppServices, request: Request) -> Response:
    """Metrics in Prometheus' text format, or OpenMetrics with exemplars where `Accept` asks for it.

    With `metrics.require_key`, for keys of that scope.
    """
    if services.settings.metrics.require_key:
        (await identify(request, services)).require("metrics")
    # The figures of processes are in files, which are not to be read on the event loop.
    accept = request.headers.get("accept", "")
    page, content_type = await asyncio.to_thread(services.metrics.render, accept)
    return Response(page, media_type=content_type)
