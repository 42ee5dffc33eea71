"""A real engine client and engine process, by default with the echo backend."""

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from app.core.config import ModelSettings
from app.core.config.engine import EngineSettings
from app.core.config.logging import LoggingSettings
from app.core.metrics import Metrics
from app.llm.client.client import EngineClient, EngineState
from app.llm.client.place import Place
from app.llm.protocol import GenerationRequest, SamplingParams, TokenEvent
from tests.support.queue import read

_ids = itertools.count()
# Seconds in which an engine starts, by whether it is vLLM, which takes 20 to import.
_PATIENCE = {False: 30, True: 240}


class EchoEngine:
    """An engine client with its metrics.

    Attributes:
        fatal: Messages of errors after which the client gave up.
    """

    def __init__(self, **settings: Any) -> None:
        self.metrics = Metrics()
        self.fatal: list[str] = []
        model = settings.get("model")
        self._patience = _PATIENCE[model.engine == "vllm" if model else False]
        self.client = EngineClient(
            model=settings.pop("model", ModelSettings(engine="echo")),
            model_label="echo",
            engine=EngineSettings(**settings),
            logging=LoggingSettings(level="ERROR"),
            huggingface_token=None,
            metrics=self.metrics,
            on_fatal=self.fatal.append,
        )

    async def until(self, state: EngineState) -> None:
        """Wait until the engine is in ``state``.

        Raises:
            TimeoutError: This takes longer than 30 seconds, or than 4 minutes with vLLM.
        """
        async with asyncio.timeout(self._patience):
            while self.client.state is not state:  # noqa: ASYNC110 - polls another process
                await asyncio.sleep(0.01)

    async def ended(self) -> str:
        """Wait until the client gives up, and return its message.

        Raises:
            TimeoutError: This takes longer than 30 seconds.
        """
        async with asyncio.timeout(30):
            while not self.fatal:  # noqa: ASYNC110 - polls another process
                await asyncio.sleep(0.01)
        (message,) = self.fatal
        return message

    def value(self, name: str, **labels: str) -> float:
        """A metric's value; 0 if it has no sample."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def echo_engine(**settings: Any) -> AsyncIterator[EchoEngine]:
    """Run an engine; ``settings`` are ``model`` or settings of the ``engine`` section."""
    engine = EchoEngine(**settings)
    await engine.client.start()
    try:
        await engine.until(EngineState.READY)
        yield engine
    finally:
        await engine.client.stop()


def engine_pids() -> list[int]:
    """Engine processes among this process' children."""
    thread = threading.main_thread().native_id
    found = []
    for child in Path(f"/proc/self/task/{thread}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError):
            if "app.llm.engine.worker" in Path(f"/proc/{child}/cmdline").read_text():
                found.append(int(child))
    return found


async def pid(*, other_than: int = 0) -> int:
    """The engine process; waits for it to be started."""
    async with asyncio.timeout(10):
        while not (found := [one for one in engine_pids() if one != other_than]):  # noqa: ASYNC110 - polls another process
            await asyncio.sleep(0.01)
    return found[0]


async def idle(engine: EchoEngine) -> None:
    """Wait until no request holds anything, here and in the engine process."""
    async with asyncio.timeout(10):
        while not engine.client.queue.is_empty or engine.client.stats.running:  # noqa: ASYNC110 - polls another process
            await asyncio.sleep(0.01)


def request(client: EngineClient, text: str = "hello", max_tokens: int = 100) -> GenerationRequest:
    """A request whose answer is ``text``."""
    assert client.tokenizer is not None
    return GenerationRequest(
        id=f"r{next(_ids)}",
        prompt_token_ids=client.tokenizer.encode_text(text),
        max_tokens=max_tokens,
        sampling=SamplingParams(),
    )


async def collect(
    client: EngineClient, text: str = "hello", place: Place | None = None
) -> list[TokenEvent]:
    """All events of one request."""
    return await read(place or client.admit(), request(client, text))
