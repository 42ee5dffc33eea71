"""What the OpenAPI document says beside its routes: the service, its address and its groups."""

from typing import Any

_DESCRIPTION = """\
One Hugging Face language model behind HTTP: text generation, chat with sessions, and OpenAI's API.

- **Keys.** The routes under `/v1` need a key, as `X-API-Key` or as `Authorization: Bearer`.
- **Streams.** `"stream": true` in a body that generates asks for server-sent events; `data: [DONE]`
  ends them.
- **Errors.** Every error is `{"error": {"code", "message", …}}` with the status that fits its code.
  429 and 503 carry `Retry-After`.
- **Request ids.** Every answer has an `X-Request-ID`, which the request's log lines carry.
"""

DOCUMENT: dict[str, Any] = {
    "summary": "One Hugging Face language model behind HTTP",
    "description": _DESCRIPTION,
    "servers": [{"url": "/", "description": "The service that served this document"}],
    "openapi_tags": [
        {"name": "inference", "description": "A bare prompt: continue it, or count its tokens."},
        {
            "name": "chat",
            "description": "A conversation; with a `session_id` the service keeps it.",
        },
        {"name": "sessions", "description": "The conversations that are kept for a key."},
        {"name": "openai", "description": "OpenAI's API; any client of it works with `/v1`."},
        {"name": "usage", "description": "What each key has used, and what is left of its budget."},
        {"name": "health", "description": "Probes, status and metrics."},
    ],
}
"""Arguments of :class:`fastapi.FastAPI`."""
