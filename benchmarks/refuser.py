"""An application that does nothing but refuse: the least that a refusal by this server can cost."""

from starlette.types import Receive, Scope, Send

_BODY = b'{"error":{"message":"Everything is taken.","code":"overloaded"}}'
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(_BODY))]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse a request, once it has been read."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 503, "headers": _HEADERS})
    await send({"type": "http.response.body", "body": _BODY})
