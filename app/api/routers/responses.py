"""POST /v1/responses: OpenAI's newer protocol; GET and DELETE of kept responses."""

import re
import uuid
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import ClassVar

import msgspec
from fastapi import APIRouter, Request, Response

from app.api.dependencies import AppServices, Caller, Deadline
from app.api.errors import STREAM, responses
from app.api.guard import KEY_SCHEMES
from app.api.openai.responses.answer import DeletedResponse, ResponseObject
from app.api.openai.responses.items import InputItem, input_messages
from app.api.openai.responses.request import ResponsesRequest
from app.api.openai.responses.shape import ResponsesShape
from app.api.openai.routes import OpenAIRoute, answer, jobs_for, take
from app.llm.tools import ChatMessage
from app.services.conversation import ConversationService, Turn
from app.utils.errors import (
    GENERATION_ERRORS,
    InvalidAPIKeyError,
    ModelNotFoundError,
    RateLimitExceededError,
    ResponseNotFoundError,
    SessionBusyError,
    StateUnavailableError,
)

_ITEM_ID = re.compile(r"[a-z]+(_[0-9a-f]{32})_[0-9]+")


class ResponsesRoute(OpenAIRoute):
    """A route whose errors name the fields of this protocol."""

    param_names: ClassVar[Mapping[str, str]] = {
        "logprobs": "top_logprobs",
        "max_tokens": "max_output_tokens",
        "messages": "input",
        "reasoning_effort": "reasoning.effort",
        "response_format": "text.format",
        "session_id": "conversation",
    }


router = APIRouter(route_class=ResponsesRoute, dependencies=KEY_SCHEMES, tags=["openai"])
_PATH = "/v1/responses/{response_id}"
# Any text is an id: declared as an argument, FastAPI would say that it can be refused.
_ID = {
    "parameters": [
        {
            "name": "response_id",
            "in": "path",
            "required": True,
            "description": "The id of a kept response.",
            "schema": {"type": "string", "examples": ["resp_0ef3c807a98541f1a9837554da921e84"]},
        }
    ]
}
_KEPT = responses(
    InvalidAPIKeyError, ResponseNotFoundError, RateLimitExceededError, StateUnavailableError
)


@router.post(
    "/v1/responses",
    summary="Answer an input and keep the response, as OpenAI does",
    response_model=ResponseObject,
    responses=STREAM
    | responses(
        *GENERATION_ERRORS,
        ModelNotFoundError,
        ResponseNotFoundError,
        SessionBusyError,
        bad_request=True,
    ),
)
async def create_response(
    body: ResponsesRequest,
    services: AppServices,
    caller: Caller,
    deadline: Deadline,
    request: Request,
) -> Response:
    """Answer as OpenAI's API does; a kept response can be continued."""
    conversation = services.conversation
    take(body, services)
    keeps = services.settings.chat_history.enabled if body.store is None else body.store
    response_id = f"resp_{uuid.uuid4().hex}"
    items = [
        await _referred(item, conversation, caller.key_id, param=f"input.{i}.id")
        for i, item in enumerate(body.input)
    ]
    messages = input_messages(items)
    if body.instructions:
        first: ChatMessage = {"role": "system", "content": body.instructions}
        messages = [first, *messages]
    (job,) = jobs_for(body, caller, deadline, request)
    job = replace(
        job,
        messages=messages,
        tools=body.tool_use,
        logprobs=body.logprobs,
        reasoning_effort=body.effort,
    )
    turn = Turn(
        session_id=body.conversation,
        previous=body.previous_response_id,
        keep_as=response_id if keeps else None,
        has_instructions=bool(body.instructions),
        drops=body.truncation == "auto",
    )
    sampling = {**services.generation.default_sampling(), **job.sampling}
    shape = ResponsesShape(
        response_id,
        {name: sampling[name] for name in ("temperature", "top_p")}
        | {"store": keeps}
        | body.echo(),
        logprobs=body.logprobs is not None,
        keep=partial(conversation.keep_response, turn),
    )
    return await answer(request, body, [job], [conversation.open_response(job, turn)], shape)


async def _referred(
    item: InputItem, conversation: ConversationService, caller: str, *, param: str
) -> InputItem:
    """The item to which a reference refers, or the item itself.

    Raises:
        ResponseNotFoundError: No kept response of the caller has it.
    """
    if item.type != "item_reference":
        return item
    if name := _ITEM_ID.fullmatch(item.id or ""):
        session = await conversation.find_response(caller, f"resp{name[1]}", param)
        for found in msgspec.json.decode(session.response)["output"]:
            if found["id"] == item.id:
                return InputItem.model_validate(found)
    raise ResponseNotFoundError(param=param)


@router.get(
    _PATH,
    summary="Show a kept response",
    response_model=ResponseObject,
    responses=_KEPT,
    openapi_extra=_ID,
)
async def get_response(request: Request, services: AppServices, caller: Caller) -> Response:
    """A response of the caller's own, as it was answered."""
    response_id = request.path_params["response_id"]
    session = await services.conversation.find_response(caller.key_id, response_id)
    return Response(session.response, media_type="application/json")


@router.delete(_PATH, summary="Forget a kept response", responses=_KEPT, openapi_extra=_ID)
async def delete_response(
    request: Request, services: AppServices, caller: Caller
) -> DeletedResponse:
    """Forget a response; those that continue it stay."""
    response_id = request.path_params["response_id"]
    await services.conversation.forget_response(caller.key_id, response_id)
    return DeletedResponse(id=response_id)
