"""POST /v1/completions: OpenAI's completions of bare prompts."""

from dataclasses import replace

from fastapi import APIRouter, Request, Response

from app.api.dependencies import AppServices, Caller, Deadline
from app.api.errors import STREAM, responses
from app.api.guard import KEY_SCHEMES
from app.api.openai.answers import Completion
from app.api.openai.routes import OpenAIRoute, answer, jobs_for, take
from app.api.openai.schemas import CompletionRequest
from app.api.openai.shapes import CompletionShape
from app.utils.errors import GENERATION_ERRORS, ModelNotFoundError

router = APIRouter(route_class=OpenAIRoute, dependencies=KEY_SCHEMES, tags=["openai"])


@router.post(
    "/v1/completions",
    summary="Continue prompts, as OpenAI does",
    response_model=Completion,
    responses=STREAM | responses(*GENERATION_ERRORS, ModelNotFoundError, bad_request=True),
)
async def completions(
    body: CompletionRequest,
    services: AppServices,
    caller: Caller,
    deadline: Deadline,
    request: Request,
) -> Response:
    """Continue one or several prompts as OpenAI's API does."""
    take(body, services)
    jobs = [
        replace(job, prompt=prompt, logprobs=body.logprobs)
        for prompt in body.prompt
        for job in jobs_for(body, caller, deadline, request)
    ]
    shape = CompletionShape(
        services.engine.info,
        n=body.n,
        logprobs=body.logprobs is not None,
        include_usage=body.include_usage,
    )
    openings = [services.generation.open(job) for job in jobs]
    return await answer(request, body, jobs, openings, shape)
