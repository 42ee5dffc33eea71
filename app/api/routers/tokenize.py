"""POST /v1/tokenize: what a prompt takes of the context."""

from fastapi import APIRouter

from app.api.dependencies import AppServices, Deadline
from app.api.errors import responses
from app.api.guard import KEY_SCHEMES, GuardedRoute
from app.api.openai.messages import chat_messages
from app.api.openai.schemas import TokenizeRequest, TokenizeResponse
from app.api.openai.tools import tools_of
from app.api.requests import reasoning_fields
from app.llm.tools import ToolUse
from app.services.answers import Job
from app.utils.errors import GENERATION_ERRORS
from app.utils.timing import within

router = APIRouter(route_class=GuardedRoute, dependencies=KEY_SCHEMES, tags=["inference"])


@router.post(
    "/v1/tokenize",
    summary="Split a text or a chat into tokens",
    response_model_exclude_unset=True,
    responses=responses(*GENERATION_ERRORS),
)
async def tokenize(
    body: TokenizeRequest, services: AppServices, deadline: Deadline
) -> TokenizeResponse:
    """Count the tokens of a text or a chat, exactly as a request with it would."""
    job = Job(
        prompt=body.text,
        messages=chat_messages(body.messages or []),
        tools=ToolUse(tools_of(body.tools)) if body.tools else None,
        **reasoning_fields(body),
    )
    tokens, context_length = await within(deadline, services.generation.tokenize(job))
    texts = {}
    if body.return_token_strs:
        texts["token_strs"] = await within(deadline, services.generation.token_texts(tokens))
    return TokenizeResponse(tokens=tokens, count=len(tokens), max_tokens=context_length, **texts)
