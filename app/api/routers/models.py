"""GET /v1/models: the names under which the model answers."""

import time

from fastapi import APIRouter

from app.api.dependencies import KEY_SCHEMES, AppServices, Services
from app.api.errors import responses
from app.api.openai_routes import OpenAIRoute, check_model
from app.api.openai_schemas import ModelCard, ModelList
from app.utils.errors import InvalidAPIKeyError, ModelNotFoundError, RateLimitExceededError

router = APIRouter(
    prefix="/v1/models",
    route_class=OpenAIRoute,
    dependencies=KEY_SCHEMES,
    tags=["openai"],
    responses=responses(InvalidAPIKeyError, RateLimitExceededError),
)


@router.get("")
async def list_models(services: AppServices) -> ModelList:
    """List the served model and its aliases."""
    model = services.settings.model
    return ModelList(data=[_card(name, services) for name in (model.label, *model.aliases)])


# A name on the hub has a slash.
@router.get("/{model:path}", responses=responses(ModelNotFoundError))
async def get_model(model: str, services: AppServices) -> ModelCard:
    """Tell about one name of the model."""
    check_model(model, services)
    return _card(model, services)


def _card(name: str, services: Services) -> ModelCard:
    owner, slash, _ = services.settings.model.label.partition("/")
    started = int(time.time() - services.uptime.seconds)
    return ModelCard(id=name, created=started, owned_by=owner if slash else "llm-service")
