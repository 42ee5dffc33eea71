"""GET and DELETE /v1/sessions/{session_id}: a conversation's history, and forgetting it."""

from typing import Annotated

from fastapi import APIRouter, Path, Response

from app.api.dependencies import AppServices, Caller
from app.api.errors import responses
from app.api.guard import KEY_SCHEMES, GuardedRoute
from app.api.schemas import AnyMessage, SessionResponse
from app.utils.errors import (
    InvalidAPIKeyError,
    RateLimitExceededError,
    SessionNotFoundError,
    StateUnavailableError,
    ValidationFailedError,
)

SessionId = Annotated[
    str,
    Path(description="The id that began the conversation.", examples=["user-123-conversation"]),
]

router = APIRouter(
    route_class=GuardedRoute,
    dependencies=KEY_SCHEMES,
    tags=["sessions"],
    responses=responses(
        InvalidAPIKeyError,
        SessionNotFoundError,
        ValidationFailedError,
        RateLimitExceededError,
        StateUnavailableError,
    ),
)


@router.get(
    "/v1/sessions/{session_id}",
    summary="Show a conversation",
    response_model=SessionResponse,
)
async def get_session(
    session_id: SessionId, services: AppServices, caller: Caller
) -> SessionResponse:
    """What was said in a conversation of the caller's own."""
    session = await services.conversation.find(caller.key_id, session_id)
    return SessionResponse(
        session_id=session.id,
        system=session.system,
        messages=[AnyMessage(role=m.role, content=m.content) for m in session.messages],
        created_at=session.created_at,
        ttl_seconds=services.settings.chat_history.ttl_seconds,
    )


@router.delete(
    "/v1/sessions/{session_id}",
    summary="Forget a conversation",
    status_code=204,
    response_class=Response,
)
async def delete_session(session_id: SessionId, services: AppServices, caller: Caller) -> Response:
    """Forget a conversation; a turn under way is not kept either."""
    await services.conversation.forget(caller.key_id, session_id)
    return Response(status_code=204)
