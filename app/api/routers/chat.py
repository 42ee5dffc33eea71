"""POST /v1/chat: an answer to a conversation."""

from fastapi import APIRouter, Request, Response

from app.api.dependencies import (
    CLIENT_CLOSED_REQUEST,
    KEY_SCHEMES,
    Caller,
    Conversation,
    Deadline,
    GeneratingRoute,
    Generation,
    send_timeout,
    unless_disconnected,
)
from app.api.errors import STREAM, responses
from app.api.requests import ChatRequest, job_fields
from app.api.schemas import AssistantMessage, ChatResponse, answer_fields
from app.api.sse import native_stream
from app.llm.tools import ChatMessage
from app.services.answers import Completion, Job, collect
from app.utils.errors import GENERATION_ERRORS, SessionBusyError

# A turn may be read and forgotten under the session's name.
_LINKS = {
    name: {"operationId": operation, "parameters": {"session_id": "$response.body#/session_id"}}
    for name, operation in (
        ("session", "get_session_v1_sessions__session_id__get"),
        ("forget", "delete_session_v1_sessions__session_id__delete"),
    )
}

router = APIRouter(route_class=GeneratingRoute, dependencies=KEY_SCHEMES, tags=["chat"])


@router.post(
    "/v1/chat",
    response_model=ChatResponse,
    response_model_exclude_none=True,
    responses={
        200: {**STREAM[200], "links": _LINKS},
        **responses(*GENERATION_ERRORS, SessionBusyError),
    },
)
async def chat(
    body: ChatRequest,
    generation: Generation,
    conversation: Conversation,
    caller: Caller,
    deadline: Deadline,
    request: Request,
) -> ChatResponse | Response:
    """Answer a conversation; with `stream: true` as server-sent events."""
    messages: list[ChatMessage] = [{"role": m.role, "content": m.content} for m in body.messages]
    job = Job(messages=messages, **job_fields(body, caller, deadline, request))
    opening = conversation.open(job, body.session_id) if body.session_id else generation.open(job)
    if body.stream:
        return native_stream(
            await opening,
            lambda piece: {"content": piece},
            send_timeout_seconds=send_timeout(request),
        )

    async def complete() -> Completion:
        return await collect(await opening)

    completion = await unless_disconnected(request, complete())
    if completion is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return ChatResponse(
        message=AssistantMessage(content=completion.text),
        session_id=body.session_id,
        **answer_fields(completion),
    )
