"""What the OpenAI routes share: errors as OpenAI has them, the model's name, and jobs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request

from app.api.dependencies import Services
from app.api.errors import openai_status, validation_error
from app.api.guard import GeneratingRoute
from app.api.openai.schemas import OpenAIFields
from app.api.requests import job_fields
from app.core.security import Principal
from app.services.answers import Job
from app.utils.errors import ModelNotFoundError, ServiceError, UnsupportedParameterError

# What pydantic says of a field that this service does not have.
_UNSUPPORTED = {"extra_forbidden", "unsupported_parameter"}


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


def check_model(name: str, services: Services) -> None:
    """Refuse a request for another model.

    Raises:
        ModelNotFoundError: It is not served here.
    """
    model = services.settings.model
    if name != model.label and name not in model.aliases:
        raise ModelNotFoundError


def jobs_for(
    body: OpenAIFields, caller: Principal, deadline: float | None, request: Request
) -> list[Job]:
    """A job for each choice of one prompt, without the prompt."""
    fields = job_fields(body, caller, deadline, request)
    bias = {int(token): value for token, value in body.logit_bias.items()}
    sampling = {**fields.pop("sampling"), "logit_bias": bias}
    # Kept answers are the same each time; several choices are meant to differ.
    cache = fields.pop("cache") and body.n == 1
    job = Job(**fields, sampling=sampling, cache=cache, end_user=body.user)
    return [
        replace(job, sampling={**sampling, "seed": seed})
        for seed in numbered_seeds(body.seed, body.n)
    ]


def numbered_seeds(seed: int | None, n: int) -> Iterator[int | None]:
    """A seed for each choice, so that they differ and yet can be repeated."""
    for index in range(n):
        yield None if seed is None else (seed + index + 2**63) % 2**64 - 2**63
