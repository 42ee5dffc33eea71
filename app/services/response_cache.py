"""Answers to identical requests: kept for a while, and generated once when asked together.

A generation that may be shared runs in a task of its own, a *flight*, and every request that
waits for it reads along. No request owns the flight, so any of them may leave; the last one to
leave ends it.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from app.core.cache import BoundedCache, CacheStatistics
from app.core.config import CacheSettings
from app.core.metrics import Metrics
from app.llm.generator import GenerationReport

# What an entry takes beside its text: keys, numbers, and Python's own overhead.
_ENTRY_OVERHEAD_BYTES = 1024
# A token's bytes, its number, and the objects that hold them.
_LOGPROB_BYTES = 160


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """A complete answer."""

    text: str
    report: GenerationReport

    @property
    def size(self) -> int:
        """Bytes it takes, roughly."""
        logprobs = sum(1 + len(entry.top) for entry in self.report.logprobs)
        text = len(self.text.encode())
        return text + _LOGPROB_BYTES * logprobs + _ENTRY_OVERHEAD_BYTES


Generate = Callable[[GenerationReport], AsyncGenerator[str, None]]
"""Starts a generation that fills the report; its first piece is empty, see TextGenerator."""


class _Flight:
    """One generation with any number of readers."""

    def __init__(self, generate: Generate, on_end: Callable[["_Flight"], None]) -> None:
        self.report = GenerationReport()
        self.readers = 0
        self._on_end = on_end
        self._pieces: list[str] = []
        self._ended = False
        self._error: BaseException | None = None
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._run(generate))

    async def _run(self, generate: Generate) -> None:
        try:
            async for piece in generate(self.report):
                self._pieces.append(piece)
                self._announce()
        except BaseException as error:  # noqa: BLE001 - handed to every reader, which raises it
            self._error = error
        finally:
            self._ended = True
            self._on_end(self)
            self._announce()

    def _announce(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    @property
    def text(self) -> str:
        """What has been generated so far."""
        return "".join(self._pieces)

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole."""
        return self._ended and self._error is None and self.report.finish_reason is not None

    async def read(self) -> AsyncGenerator[str, None]:
        """The pieces from the first on."""
        self.readers += 1
        position = 0
        try:
            while True:
                if position < len(self._pieces):
                    # A reader that lags gets what it missed in one piece; the first, empty one
                    # stays by itself, since it says that the request was accepted.
                    end = len(self._pieces) if position else 1
                    piece = "".join(self._pieces[position:end])
                    position = end
                    yield piece
                elif self._error is not None:
                    raise self._error
                elif self._ended:
                    return
                else:
                    await self._news.wait()
        finally:
            self.readers -= 1
            if self.readers == 0 and not self._ended:
                # Nobody may join what is about to be cancelled.
                self._on_end(self)
                self._task.cancel()


class ResponseCache:
    """Serves kept answers, joins identical requests, and keeps new answers."""

    def __init__(self, settings: CacheSettings, metrics: Metrics) -> None:
        self._enabled = settings.enabled
        self._metrics = metrics
        self._flights: dict[str, _Flight] = {}
        self._cache: BoundedCache[StoredAnswer] = BoundedCache(
            max_entries=settings.size,
            max_bytes=settings.max_bytes,
            ttl_seconds=settings.ttl_seconds,
            size_of=lambda answer: answer.size,
        )
        metrics.cache_entries.set_function(lambda: len(self._cache))

    def lookup(self, key: str | None) -> StoredAnswer | None:
        """A kept answer; its report is the caller's own.

        Args:
            key: From :func:`cache_key`; ``None`` for a request that wants no cache.
        """
        if key is None or not self._enabled:
            return None
        stored = self._cache.get(key)
        if stored is None:
            return None
        self._metrics.cache_requests.labels("hit").inc()
        return replace(stored, report=replace(stored.report, id=GenerationReport().id))

    def generate(
        self, key: str | None, generate: Generate
    ) -> tuple[GenerationReport, AsyncGenerator[str, None]]:
        """A new answer, or a place beside those who already wait for the same one.

        Returns:
            The report that will be filled, and the pieces.
        """
        if key is None or not self._enabled:
            self._metrics.cache_requests.labels("bypass").inc()
            report = GenerationReport()
            return report, generate(report)
        flight = self._flights.get(key)
        if flight is not None:
            self._metrics.cache_requests.labels("coalesced").inc()
            return flight.report, flight.read()
        self._metrics.cache_requests.labels("miss").inc()

        def on_end(ended: _Flight) -> None:
            if self._flights.get(key) is ended:
                del self._flights[key]
            if ended.is_complete:
                self._cache.put(key, StoredAnswer(ended.text, ended.report))

        flight = self._flights[key] = _Flight(generate, on_end)
        return flight.report, flight.read()

    def statistics(self) -> CacheStatistics:
        """How the cache is doing."""
        return self._cache.statistics()


def cache_key(*parts: Any) -> str:
    """SHA-256 of everything that decides an answer, and of who asks for it."""
    # Not as MessagePack, which has no integers above 64 bits; the schema of a tool may.
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
