"""What each request for an answer came to, by API key: a metric, and a line for audits."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.dependencies import Services
from app.api.disconnects import CLIENT_CLOSED_REQUEST
from app.core.logging import AUDIT, get_logger
from app.core.security import Principal
from app.state.usage import this_request

log = get_logger(AUDIT)

_OUTCOMES = {
    CLIENT_CLOSED_REQUEST: "cancelled",
    429: "limited",
    503: "unavailable",
    504: "timeout",
}


def outcome_of(status: int) -> str:
    """The outcome of a request, out of a short list, by its status or that of its stream's end."""
    if status < 400:
        return "ok"
    return _OUTCOMES.get(status) or ("refused" if status < 500 else "failed")


def accounted(app: ASGIApp) -> ASGIApp:
    """A generating route's application, whose requests are counted and audited at their end.

    The route leaves the caller as ``principal`` and the status as ``outcome`` in the request's
    state. For a stream that is the status it would have had, were it whole.
    """

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})
        used = [0, 0]
        token = this_request.set(used)
        try:
            await app(scope, receive, send)
        except ClientDisconnect:
            state["outcome"] = CLIENT_CLOSED_REQUEST
            raise
        finally:
            this_request.reset(token)
            _record(scope, state, used)

    return run


def _record(scope: Scope, state: Mapping[str, Any], used: Sequence[int]) -> None:
    services: Services = scope["app"].state.services
    caller: Principal | None = state.get("principal")
    label = services.keys.label(caller.key_id if caller else None)
    # A request that ends with an exception has left none.
    outcome = outcome_of(state.get("outcome", 500))
    services.metrics.key_requests.labels(label, outcome).inc()
    log.info(
        "%s: POST %s, %s",
        caller.name if caller else "no key",
        scope["route"].path,
        outcome,
        extra={
            "key": caller and caller.name,
            "route": scope["route"].path,
            "model": services.engine.model_label,
            "prompt_tokens": used[0],
            "completion_tokens": used[1],
            "outcome": outcome,
        },
    )
