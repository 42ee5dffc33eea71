"""POST /v1/generate: text from a prompt."""

from fastapi import APIRouter, Request, Response

from app.api.dependencies import AppServices, Caller, Deadline
from app.api.errors import STREAM, responses
from app.api.guard import KEY_SCHEMES, GeneratingRoute
from app.api.native import GenerateShape
from app.api.requests import GenerateRequest, job_fields
from app.api.respond import respond
from app.api.schemas import GenerateResponse
from app.services.answers import Job
from app.utils.errors import GENERATION_ERRORS

router = APIRouter(route_class=GeneratingRoute, dependencies=KEY_SCHEMES, tags=["inference"])


@router.post(
    "/v1/generate",
    summary="Continue a prompt",
    response_model=GenerateResponse,
    responses=STREAM | responses(*GENERATION_ERRORS),
)
async def generate(
    body: GenerateRequest,
    services: AppServices,
    caller: Caller,
    deadline: Deadline,
    request: Request,
) -> Response:
    """Generate text from a prompt; with `stream: true` as server-sent events."""
    job = Job(prompt=body.prompt, **job_fields(body, caller, deadline, request))
    opening = services.generation.open(job)
    return await respond(request, [opening], GenerateShape(body.prompt), stream=body.stream)
