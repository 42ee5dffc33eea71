"""What the OpenAI routes share: errors as OpenAI has them, the model's name, and jobs."""

from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request, Response
from msgspec import structs

from app.api.dependencies import Services, services_of
from app.api.errors import openai_status, validation_error
from app.api.guard import GeneratingRoute
from app.api.openai.responses.request import ResponsesRequest
from app.api.openai.schemas import ChatCompletionRequest, CompletionRequest, OpenAIFields
from app.api.requests import sampling_fields
from app.api.respond import Shape, respond
from app.core.security import Principal
from app.llm.protocol import REQUEST_FEATURES, SAMPLING_FIELDS, JsonSchemaGrammar
from app.services.answers import Answer, Job
from app.utils.errors import ModelNotFoundError, ServiceError, UnsupportedParameterError

OpenAIBody = OpenAIFields | ResponsesRequest
Openings = Sequence[Coroutine[Any, Any, Answer]]

# What pydantic says of a field that this service does not have.
_UNSUPPORTED = {"extra_forbidden", "unsupported_parameter"}

# Fields that need a feature of the engine by another name.
_BY_FEATURE = {"min_tokens": "ignore_eos", "grammar": "response_format"}


class OpenAIRoute(GeneratingRoute):
    """A route whose refusals have OpenAI's status codes: 400 for whatever is wrong with a body."""

    def refusal(self, faults: Sequence[Mapping[str, Any]]) -> ServiceError:
        """What pydantic found wrong with a request."""
        error = validation_error(faults)
        unsupported = [f for f in faults if f["type"] in _UNSUPPORTED]
        if not unsupported:
            return error
        first = validation_error(unsupported[:1])
        message = first.message
        if unsupported[0]["type"] == "extra_forbidden":
            message = f"{first.param} is not supported by this service; docs/api.md lists what is."
        return UnsupportedParameterError(message, param=first.param)

    def status_of(self, error: ServiceError) -> int:
        """The status with which an error is answered here."""
        return openai_status(error)


def take(body: OpenAIBody, services: Services) -> None:
    """Count the fields of a request that have no effect.

    Raises:
        ModelNotFoundError: It asks for another model.
    """
    check_model(body.model, services)
    for field in body.hints():
        services.metrics.ignored_fields.labels(field).inc()


def check_model(name: str, services: Services) -> None:
    """Refuse a request for another model.

    Raises:
        ModelNotFoundError: It is not served here.
    """
    model = services.settings.model
    if name != model.label and name not in model.aliases:
        raise ModelNotFoundError


def supported_parameters(services: Services) -> list[str]:
    """The fields of OpenAI's routes that the served model and its engine honour.

    None before the model is loaded.
    """
    engine = services.engine
    if engine.info is None or engine.tokenizer is None:
        return []
    able, reasoning = engine.info.supported, engine.tokenizer.reasoning
    unable = {*SAMPLING_FIELDS, *REQUEST_FEATURES} - able
    unable |= {field for feature, field in _BY_FEATURE.items() if feature in unable}
    if reasoning.form is None:
        unable |= {"reasoning", "reasoning_effort", "thinking_token_budget"}
    if not reasoning.variables:
        unable.add("chat_template_kwargs")
    bodies = (ChatCompletionRequest, CompletionRequest, ResponsesRequest)
    return sorted({name for body in bodies for name in body.honoured()} - unable)


def jobs_for(
    body: OpenAIBody, caller: Principal, deadline: float | None, request: Request
) -> list[Job]:
    """A job for each choice of one prompt, without the prompt."""
    fields = sampling_fields(body, caller, deadline, request)
    form = body.response_format
    grammar = form.grammar() if form else None
    if isinstance(grammar, JsonSchemaGrammar) and form and form.json_schema:
        strict = form.json_schema.strict
        grammar = structs.replace(grammar, strict=strict, where=body.schema_place)
    fields["grammar"] = grammar
    fields["max_tokens"] = _cut(body, services_of(request)) or body.max_tokens
    bias = {int(token): value for token, value in body.logit_bias.items()}
    sampling = {**fields.pop("sampling"), "logit_bias": bias}
    # Kept answers are the same each time; several choices are meant to differ.
    cache = fields.pop("cache") and body.n == 1
    job = Job(**fields, sampling=sampling, cache=cache, end_user=body.user)
    return [
        replace(job, sampling={**sampling, "seed": seed})
        for seed in numbered_seeds(body.seed, body.n)
    ]


async def answer(
    request: Request, body: OpenAIBody, jobs: Sequence[Job], opened: Openings, shape: Shape
) -> Response:
    """The response to a request, with headers that tell how it differs from what was asked.

    ``opened`` opens the answers of the jobs.

    Raises:
        ServiceError: See :func:`respond`.
    """
    services = services_of(request)
    response = await respond(request, opened, shape, stream=body.stream)
    if (cut := _cut(body, services)) is not None:
        response.headers["X-Max-Tokens-Applied"] = str(cut)
    if keywords := await services.generation.not_held(jobs[0]):
        response.headers["X-Schema-Not-Held"] = ", ".join(sorted(keywords))
    return response


def _cut(body: OpenAIBody, services: Services) -> int | None:
    """The most tokens of an answer, if the request asks for more and they are cut to it."""
    model = services.settings.model
    is_cut = model.max_tokens_policy == "clamp" and (body.max_tokens or 0) > model.max_tokens
    return model.max_tokens if is_cut else None


def numbered_seeds(seed: int | None, n: int) -> Iterator[int | None]:
    """A seed for each choice, so that they differ and yet can be repeated."""
    for index in range(n):
        yield None if seed is None else (seed + index + 2**63) % 2**64 - 2**63
