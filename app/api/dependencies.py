"""The dependencies of route handlers, as named types."""

import asyncio
import re
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Header, Request
from pydantic import BeforeValidator, WithJsonSchema

from app.api.load_shedding import LoadShedding
from app.core.config import Settings
from app.core.metrics import Metrics
from app.core.rate_limit import CallerLimits, ClientAddress
from app.core.security import KeyRing, Principal
from app.llm.client.client import EngineClient
from app.services.conversation import ConversationService
from app.services.generation import GenerationService
from app.state.shared import State


@dataclass(frozen=True, slots=True)
class Services:
    """Everything the composition root built, for the routers; ``started`` is monotonic time."""

    settings: Settings
    started: float
    metrics: Metrics
    keys: KeyRing
    limits: CallerLimits
    addresses: ClientAddress
    state: State
    shedding: LoadShedding
    engine: EngineClient
    generation: GenerationService
    conversation: ConversationService


def services_of(request: Request) -> Services:
    """The application's services, outside of a dependency."""
    return cast("Services", request.app.state.services)


# These are coroutines because FastAPI would run plain functions in a thread.


async def get_services(request: Request) -> Services:
    """The application's services."""
    return services_of(request)


async def get_caller(request: Request) -> Principal:
    """The caller, whom the guard has identified before the body was read."""
    return cast("Principal", request.state.principal)


# float() would also take exponents, infinities, underscores and digits of other scripts. At least
# one digit is not 0.
_POSITIVE_DECIMAL = r"^(0{0,11}[1-9][0-9]{0,11}(\.[0-9]{1,12})?|0{1,12}\.0{0,11}[1-9][0-9]{0,11})$"


def _positive_decimal(text: str) -> float:
    if not re.fullmatch(_POSITIVE_DECIMAL, text):
        raise ValueError("must be a positive decimal number of seconds, such as 2.5")
    return float(text)


RequestTimeout = Annotated[
    float | None,
    BeforeValidator(_positive_decimal),
    WithJsonSchema({"type": "string", "pattern": _POSITIVE_DECIMAL}),
    Header(
        alias="X-Request-Timeout",
        description="Seconds in which the answer must be complete; past that, 504. At most "
        "engine.request_timeout_seconds takes effect.",
    ),
]


async def get_deadline(request: Request, timeout: RequestTimeout = None) -> float | None:  # noqa: ASYNC109 - the caller's limit for the whole request, not for this function
    """The caller's deadline on the event loop's clock; ``None`` if it set no timeout."""
    if timeout is None:
        return None
    longest = services_of(request).settings.engine.request_timeout_seconds
    return asyncio.get_running_loop().time() + min(timeout, longest)


AppServices = Annotated[Services, Depends(get_services)]
Caller = Annotated[Principal, Depends(get_caller)]
Deadline = Annotated[float | None, Depends(get_deadline)]
