"""GET /v1/usage: what the caller's key has used; with the scope admin, what every key has."""

from dataclasses import asdict

from fastapi import APIRouter

from app.api.dependencies import AppServices, Caller
from app.api.errors import responses
from app.api.guard import KEY_SCHEMES, AnyKeyRoute
from app.api.schemas import KeyUsage, UsageCount, UsageResponse
from app.core.security import Principal
from app.state.usage import Usage, UsageLedger
from app.utils.errors import InvalidAPIKeyError, RateLimitExceededError

router = APIRouter(route_class=AnyKeyRoute, dependencies=KEY_SCHEMES, tags=["usage"])


@router.get(
    "/v1/usage",
    summary="Requests and tokens of each key",
    responses=responses(InvalidAPIKeyError, RateLimitExceededError),
)
async def get_usage(services: AppServices, caller: Caller) -> UsageResponse:
    """Requests and tokens of the caller's key, or of every key for one with the scope admin."""
    ledger = services.state.usage
    shown = services.keys.principals if "admin" in caller.scopes else [caller]
    keys = [await _usage_of(principal, ledger) for principal in shown]
    return UsageResponse(
        day=ledger.today,
        seconds_left=ledger.seconds_left,
        since=ledger.since,
        keys=keys,
    )


async def _usage_of(principal: Principal, ledger: UsageLedger) -> KeyUsage:
    today, total = await ledger.of(principal.key_id)
    budget = principal.daily_tokens
    return KeyUsage(
        name=principal.name,
        today=_count(today),
        total=_count(total),
        daily_tokens=budget,
        remaining_tokens=None if budget is None else max(budget - today.tokens, 0),
    )


def _count(usage: Usage) -> UsageCount:
    return UsageCount(**asdict(usage), total_tokens=usage.tokens)
