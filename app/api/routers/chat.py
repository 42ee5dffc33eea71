"""POST /v1/chat: an answer to a conversation."""

from fastapi import APIRouter, Request, Response

from app.api.dependencies import (
    CLIENT_CLOSED_REQUEST,
    KEY_SCHEMES,
    Caller,
    Generation,
    GuardedRoute,
    unless_disconnected,
)
from app.api.errors import responses
from app.api.schemas import (
    AssistantMessage,
    ChatRequest,
    ChatResponse,
    answer_fields,
    job_fields,
)
from app.api.sse import EventStream, answer_frames
from app.services.generation import Job
from app.utils.errors import GENERATION_ERRORS

router = APIRouter(route_class=GuardedRoute, dependencies=KEY_SCHEMES, tags=["chat"])


@router.post("/v1/chat", response_model=ChatResponse, responses=responses(*GENERATION_ERRORS))
async def chat(
    body: ChatRequest, generation: Generation, caller: Caller, request: Request
) -> ChatResponse | Response:
    """Answer a conversation; with `stream: true` as server-sent events."""
    job = Job(messages=[m.model_dump() for m in body.messages], **job_fields(body, caller, request))
    if body.stream:
        answer = await generation.open(job)
        return EventStream(answer_frames(answer, lambda piece: {"content": piece}))
    completion = await unless_disconnected(request, generation.complete(job))
    if completion is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return ChatResponse(
        message=AssistantMessage(content=completion.text), **answer_fields(completion)
    )
