"""POST /v1/chat: an answer to a conversation."""

from fastapi import APIRouter, Request, Response

from app.api.dependencies import AppServices, Caller, Deadline
from app.api.errors import STREAM, responses
from app.api.guard import KEY_SCHEMES, GeneratingRoute
from app.api.native import ChatShape
from app.api.requests import ChatRequest, job_fields, reasoning_fields
from app.api.respond import respond
from app.api.schemas import ChatResponse
from app.llm.tools import ChatMessage
from app.services.answers import Job
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
    summary="Answer a conversation, kept in a session or not",
    response_model=ChatResponse,
    responses={
        200: {**STREAM[200], "links": _LINKS},
        **responses(*GENERATION_ERRORS, SessionBusyError),
    },
)
async def chat(
    body: ChatRequest,
    services: AppServices,
    caller: Caller,
    deadline: Deadline,
    request: Request,
) -> Response:
    """Answer a conversation; with `stream: true` as server-sent events."""
    messages: list[ChatMessage] = [
        {"role": m.role, "content": m.content, "reasoning_content": m.reasoning}
        for m in body.messages
    ]
    fields = job_fields(body, caller, deadline, request) | reasoning_fields(body)
    job = Job(messages=messages, **fields)
    opening = (
        services.conversation.open(job, body.session_id)
        if body.session_id
        else services.generation.open(job)
    )
    return await respond(request, [opening], ChatShape(body.session_id), stream=body.stream)
