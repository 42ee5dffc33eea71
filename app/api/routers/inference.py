"""POST /v1/generate: text from a prompt."""

from fastapi import APIRouter, Request, Response

from app.api.dependencies import (
    CLIENT_CLOSED_REQUEST,
    KEY_SCHEMES,
    Caller,
    Deadline,
    GeneratingRoute,
    Generation,
    send_timeout,
    unless_disconnected,
)
from app.api.errors import STREAM, responses
from app.api.requests import GenerateRequest, job_fields
from app.api.schemas import GenerateResponse, answer_fields
from app.api.sse import native_stream
from app.services.answers import Job
from app.utils.errors import GENERATION_ERRORS

router = APIRouter(route_class=GeneratingRoute, dependencies=KEY_SCHEMES, tags=["inference"])


@router.post(
    "/v1/generate",
    response_model=GenerateResponse,
    response_model_exclude_none=True,
    responses=STREAM | responses(*GENERATION_ERRORS),
)
async def generate(
    body: GenerateRequest,
    generation: Generation,
    caller: Caller,
    deadline: Deadline,
    request: Request,
) -> GenerateResponse | Response:
    """Generate text from a prompt; with `stream: true` as server-sent events."""
    job = Job(prompt=body.prompt, **job_fields(body, caller, deadline, request))
    if body.stream:
        answer = await generation.open(job)
        return native_stream(
            answer, lambda piece: {"text": piece}, send_timeout_seconds=send_timeout(request)
        )
    completion = await unless_disconnected(request, generation.complete(job))
    if completion is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return GenerateResponse(
        generated_text=completion.text, prompt=body.prompt, **answer_fields(completion)
    )
