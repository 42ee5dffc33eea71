"""POST /v1/chat/completions: OpenAI's chat."""

from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from app.api.dependencies import AppServices, Caller, Deadline
from app.api.errors import STREAM, responses
from app.api.guard import KEY_SCHEMES
from app.api.openai.answers import ChatCompletion
from app.api.openai.messages import chat_messages
from app.api.openai.routes import OpenAIRoute, answer, jobs_for, take
from app.api.openai.schemas import ChatCompletionRequest
from app.api.openai.shapes import ChatCompletionShape
from app.api.requests import reasoning_fields
from app.utils.errors import (
    GENERATION_ERRORS,
    ModelNotFoundError,
    SessionBusyError,
    UnsupportedParameterError,
)

router = APIRouter(route_class=OpenAIRoute, dependencies=KEY_SCHEMES, tags=["openai"])

SessionId = Annotated[
    str | None,
    Header(
        alias="X-Session-ID",
        pattern=r"^[A-Za-z0-9._:-]{1,128}$",
        description="Keeps the conversation, as session_id does on /v1/chat; with it, only the "
        "new messages are sent.",
    ),
]

# Headers are strings, and the document says which.
Replaced = Annotated[
    str,
    Header(
        alias="X-Session-Replace",
        pattern="^[0-9]{1,5}$",
        description="How many of the session's last messages this turn replaces, once its answer "
        "is complete: to ask again, or to change what was asked.",
    ),
]


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation, as OpenAI does",
    response_model=ChatCompletion,
    responses=STREAM
    | responses(*GENERATION_ERRORS, ModelNotFoundError, SessionBusyError, bad_request=True),
)
async def chat_completions(
    body: ChatCompletionRequest,
    services: AppServices,
    caller: Caller,
    deadline: Deadline,
    request: Request,
    session_id: SessionId = None,
    replaced: Replaced = "0",
) -> Response:
    """Answer a conversation as OpenAI's API does."""
    take(body, services)
    _check_session(body, session_id)
    messages = chat_messages(body.messages)
    jobs = [
        replace(
            job,
            messages=messages,
            tools=body.tool_use,
            logprobs=body.top_logprobs if body.logprobs else None,
            **reasoning_fields(body),
        )
        for job in jobs_for(body, caller, deadline, request)
    ]
    shape = ChatCompletionShape(
        services.engine.info,
        n=body.n,
        logprobs=body.logprobs,
        include_usage=body.include_usage,
        reasoning_names=services.settings.model.reasoning_names,
    )
    openings = [
        services.conversation.open(job, session_id, replaced=int(replaced))
        if session_id
        else services.generation.open(job)
        for job in jobs
    ]
    return await answer(request, body, jobs, openings, shape)


def _check_session(body: ChatCompletionRequest, session_id: str | None) -> None:
    """Refuse what a conversation cannot keep.

    Raises:
        UnsupportedParameterError: Several answers, or no message to answer.
    """
    if session_id is None:
        return
    if body.n > 1:
        raise UnsupportedParameterError("A session keeps one answer; n must be 1.", param="n")
    if body.messages[-1].role not in ("user", "tool"):
        raise UnsupportedParameterError(
            "With X-Session-ID the last message must be a user's or a tool's.", param="messages"
        )
