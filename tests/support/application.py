"""The application on the test's own event loop, over the echo engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.api.dependencies import Services
from app.core.config import Settings
from app.llm.client.client import EngineState
from app.main import create_app

KEY, OTHER = "key-of-alice", "key-of-bob"


def make_app(**sections: Any) -> FastAPI:
    """An application on the echo engine with two keys."""
    settings: dict[str, Any] = {
        "model": {"engine": "echo"},
        "security": {"api_key": KEY, "api_keys": [{"name": "bob", "key": OTHER}]},
        "rate_limit": {"enabled": False},
        "logging": {"level": "ERROR"},
    }
    for name, values in sections.items():
        settings[name] = {**settings.get(name, {}), **values}
    return create_app(Settings(_env_file=None, **settings), on_fatal=pytest.fail)


class Client:
    """Talks to an application that runs on this event loop."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.services: Services = app.state.services
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", headers={"X-API-Key": KEY}
        )

    async def say(self, text: str, session: str | None = "s", **fields: Any) -> httpx.Response:
        """One turn; ``key`` and ``messages`` may replace the defaults."""
        headers = {"X-API-Key": fields.pop("key", KEY)}
        messages = fields.pop("messages", [{"role": "user", "content": text}])
        body = {"messages": messages, "session_id": session, **fields}
        return await self.http.post("/v1/chat", json=body, headers=headers)

    async def until_running(self) -> None:
        """Wait until the engine generates for one request."""
        async with asyncio.timeout(30):
            while (await self._running()) != 1:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.005)

    async def _running(self) -> int:
        status = (await self.http.get("/status")).json()
        return int(status["engine"]["queue"]["running"])

    async def history(self, session: str = "s", key: str = KEY) -> list[tuple[str, str]] | None:
        """Role and content of each message; ``None`` for 404."""
        response = await self.http.get(f"/v1/sessions/{session}", headers={"X-API-Key": key})
        if response.status_code == 404:
            assert response.json()["error"]["code"] == "session_not_found"
            return None
        return [(m["role"], m["content"]) for m in response.json()["messages"]]


@asynccontextmanager
async def start(**sections: Any) -> AsyncIterator[Client]:
    """A client of a running application."""
    # Making it reads files, as a module does that is imported.
    app = await asyncio.to_thread(make_app, **sections)
    async with app.router.lifespan_context(app):
        client = Client(app)
        async with asyncio.timeout(30):
            while client.services.engine.state is not EngineState.READY:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.01)
        yield client
        await client.http.aclose()
