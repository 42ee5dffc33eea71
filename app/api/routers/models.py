"""GET /v1/models: the names under which the model answers."""

import time

from fastapi import APIRouter, Request

from app.api.dependencies import AppServices, Services
from app.api.errors import responses
from app.api.guard import KEY_SCHEMES
from app.api.openai.routes import OpenAIRoute, check_model, supported_parameters
from app.api.openai.schemas import ModelCard, ModelList
from app.utils.errors import InvalidAPIKeyError, ModelNotFoundError, RateLimitExceededError

_MODEL = {
    "name": "model",
    "in": "path",
    "required": True,
    "description": "The model's name, or one of model.aliases.",
    "schema": {"type": "string", "examples": ["default"]},
}

router = APIRouter(
    prefix="/v1/models",
    route_class=OpenAIRoute,
    dependencies=KEY_SCHEMES,
    tags=["openai"],
    responses=responses(InvalidAPIKeyError, RateLimitExceededError),
)


@router.get("", summary="List the model under its names")
async def list_models(services: AppServices) -> ModelList:
    """List the served model and its aliases."""
    model = services.settings.model
    return ModelList(data=[_card(name, services) for name in (model.label, *model.aliases)])


# A name on the hub has a slash. Any text is a name: declared as an argument, FastAPI would say that
# it can be refused.
@router.get(
    "/{model:path}",
    summary="Show the model under one of its names",
    responses=responses(ModelNotFoundError),
    openapi_extra={"parameters": [_MODEL]},
)
async def get_model(request: Request, services: AppServices) -> ModelCard:
    """Tell about one name of the model."""
    model = request.path_params["model"]
    check_model(model, services)
    return _card(model, services)


def _card(name: str, services: Services) -> ModelCard:
    model, info = services.settings.model, services.engine.info
    owner, slash, _ = model.label.partition("/")
    return ModelCard(
        id=name,
        created=int(time.time() - (time.monotonic() - services.started)),
        owned_by=owner if slash else "llm-service",
        context_length=info.context_length if info else None,
        max_tokens=model.max_tokens,
        supported_parameters=supported_parameters(services),
    )
