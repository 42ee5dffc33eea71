"""Measures the way of one streamed chat through the API process: classes, generators, functions.

The service runs in this process under uvicorn, with the echo engine in its own process. A client on
another thread asks for a streamed chat, and a profile hook sees every Python call on the event
loop's thread meanwhile.
"""

import asyncio
import inspect
import json
import socket
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import httpx
import uvicorn

from app.main import create_app
from tests.conftest import make_settings
from tests.support.service import API_KEY, START_SECONDS

_TEXT = "a streamed chat of some forty tokens, counted"
# A generator on the way is resumed for each token; those of one request alone are not.
_EACH_TOKEN = len(_TEXT) // 2


@dataclass
class Way:
    """What one streamed chat met.

    Attributes:
        classes: Classes of ``app`` of which a method ran, as ``module.Class``.
        functions: Functions of ``app`` that ran.
        generators: Asynchronous generators, of any package, that each token passed.
    """

    classes: set[str] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)
    resumed: Counter[str] = field(default_factory=Counter)

    @property
    def generators(self) -> set[str]:
        """Those that were resumed about once for each token."""
        return {name for name, count in self.resumed.items() if count >= _EACH_TOKEN}

    def see(self, frame: FrameType) -> None:
        """Note a call."""
        code = frame.f_code
        module = str(frame.f_globals.get("__name__", ""))
        if code.co_flags & inspect.CO_ASYNC_GENERATOR:
            self.resumed[f"{module}:{code.co_qualname}"] += 1
        if module.startswith("app."):
            self.functions.add(f"{module}:{code.co_qualname}")
        if owner := _class_of(code, frame):
            self.classes.add(owner)


def _class_of(code: CodeType, frame: FrameType) -> str | None:
    """The class of ``app`` whose method this is, inherited methods included."""
    if not code.co_argcount:
        return None
    first = frame.f_locals.get(code.co_varnames[0])
    kind = first if isinstance(first, type) else type(first)
    return f"{kind.__module__}.{kind.__qualname__}" if kind.__module__.startswith("app.") else None


def measure(**sections: dict[str, Any]) -> Way:
    """Run the service, stream two chats, and note the way of the second."""
    way = Way()
    app = create_app(make_settings(logging={"level": "ERROR"}, **sections))
    with socket.socket() as listener, asyncio.Runner() as runner:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, loop="asyncio"))
        loop = runner.get_loop()
        thread = threading.Thread(
            target=lambda: runner.run(server.serve([listener])), daemon=True, name="service"
        )
        thread.start()
        try:
            _stream_twice(listener.getsockname()[1], way, loop)
        finally:
            server.should_exit = True
            thread.join(START_SECONDS)
    return way


def _stream_twice(port: int, way: Way, loop: asyncio.AbstractEventLoop) -> None:
    headers = {"X-API-Key": API_KEY}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers) as client:
        _until_ready(client)
        _chat(client, "first")
        _profile(loop, lambda frame, event, _: way.see(frame) if event == "call" else None)
        _chat(client, _TEXT)
        _profile(loop, None)


def _profile(loop: asyncio.AbstractEventLoop, hook: Any) -> None:
    """Set the profile hook of the event loop's thread."""
    done = threading.Event()

    def switch() -> None:
        sys.setprofile(hook)
        done.set()

    loop.call_soon_threadsafe(switch)
    assert done.wait(START_SECONDS)


def _until_ready(client: httpx.Client) -> None:
    for _ in range(int(START_SECONDS * 50)):
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.ConnectError:
            pass
        threading.Event().wait(0.02)
    raise AssertionError("the service did not become ready")


def _chat(client: httpx.Client, text: str) -> None:
    body = {"messages": [{"role": "user", "content": text}], "stream": True}
    with client.stream("POST", "/v1/chat", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    pieces = [json.loads(line[6:])["delta"].get("content", "") for line in lines[:-1]]
    assert "".join(pieces) == text
