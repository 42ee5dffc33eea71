"""The header Idempotency-Key: a request that is sent again gets the same bytes as an answer.

Whole answers and streams are recorded on their way out, so that routes need to know nothing of it.
Only complete successes are kept. After a rejection, a caller's mistake or a fault, the key is free
for another try.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from app.api.sse import PING, ends_stream, has_error_event
from app.state.idempotency import Claim, IdempotencyStore, KeptAnswer
from app.utils.errors import UnsupportedParameterError, ValidationFailedError

HEADER = "Idempotency-Key"
REPLAYED = "Idempotency-Replayed"

_MAX_CHARS = 255
_PRINTABLE_ASCII = re.compile(rf"[ -~]{{1,{_MAX_CHARS}}}")
# Headers that decide, with the body, which request it is. The others are about its delivery.
_MEANINGFUL_HEADERS = ("x-session-id", "x-session-replace")

PARAMETER: dict[str, Any] = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "description": "Names this request. The same request with the same key is answered with the "
    "first one's answer, and `Idempotency-Replayed: true`, for idempotency.ttl_seconds.",
    "schema": {"type": "string", "minLength": 1, "maxLength": _MAX_CHARS, "pattern": "^[ -~]+$"},
}
"""The header in the OpenAPI document."""


async def answer_once(
    store: IdempotencyStore,
    request: Request,
    body: bytes,
    answer: Callable[[], Awaitable[Response]],
) -> Response:
    """Answer a request, or repeat the answer of an earlier one with the same key.

    Args:
        store: Earlier answers.
        request: Its ``state.principal`` is the caller.
        body: The request's body.
        answer: Makes the answer of a request that has not been answered yet.

    Raises:
        ValidationFailedError: The header is sent twice, or is not a valid key.
        UnsupportedParameterError: There is a key, but ``idempotency.enabled`` is false.
        IdempotencyKeyReusedError: The key was used for another request.
        IdempotencyKeyInUseError: The same request is being answered.
        StateUnavailableError: Earlier answers cannot be reached.
    """
    key = _key(request)
    if key is None:
        return await answer()
    if not store.enabled:
        raise UnsupportedParameterError(
            "Idempotency keys are switched off here (idempotency.enabled).", param=HEADER
        )
    claim = await store.claim(request.state.principal.key_id, key, _fingerprint(request, body))
    if isinstance(claim, KeptAnswer):
        return _replay(claim)
    try:
        return _RecordedResponse(await answer(), claim)
    except BaseException:
        await claim.release()
        raise


def _key(request: Request) -> str | None:
    keys = request.headers.getlist(HEADER)
    if not keys:
        return None
    if len(keys) > 1 or not _PRINTABLE_ASCII.fullmatch(keys[0]):
        raise ValidationFailedError(
            f"{HEADER}: must be one text of 1 to {_MAX_CHARS} printable ASCII characters",
            param=HEADER,
        )
    return keys[0]


def _fingerprint(request: Request, body: bytes) -> bytes:
    """A SHA-256 hash that differs for any two requests that could have different answers."""
    scope = request.scope
    headers = [request.headers.get(name, "") for name in _MEANINGFUL_HEADERS]
    digest = hashlib.sha256()
    for part in (scope["method"], scope["path"], scope["query_string"], *headers, body):
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        # Each part is preceded by its length, so that no byte can move into the next part.
        digest.update(b"%d:" % len(data))
        digest.update(data)
    return digest.digest()


def _replay(kept: KeptAnswer) -> Response:
    response = Response(kept.body, status_code=kept.status)
    response.raw_headers = list(kept.headers)
    response.headers[REPLAYED] = "true"
    return response


class _RecordedResponse(Response):
    """A response that is recorded for its claim; an incomplete one releases the claim."""

    def __init__(self, response: Response, claim: Claim) -> None:
        self.status_code = response.status_code
        self._response = response
        self._claim = claim
        # Headers that are added later, such as those of the rate limit, belong to this delivery.
        self._own_headers = tuple(response.raw_headers)
        self._body: list[bytes] = []
        self._room = claim.max_body_bytes

    @property
    def headers(self) -> MutableHeaders:
        """The headers of the response that is recorded."""
        return self._response.headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""

        async def record(message: Message) -> None:
            # It is kept before it is sent, since a client that has seen the end may repeat the
            # request at once.
            await self._record(message)
            await send(message)

        try:
            await self._response(scope, receive, record)
        finally:
            await self._claim.release()

    async def _record(self, message: Message) -> None:
        if message["type"] != "http.response.body" or not self._claim.is_open:
            return
        chunk = message.get("body", b"")
        self._room -= len(chunk)
        if not 200 <= self.status_code < 300 or self._room < 0 or has_error_event(chunk):
            self._body.clear()
            await self._claim.release()
            return
        if chunk != PING:
            self._body.append(chunk)
        if not message.get("more_body", False) or ends_stream(chunk):
            body = b"".join(self._body)
            await self._claim.keep(KeptAnswer(self.status_code, self._own_headers, body))
