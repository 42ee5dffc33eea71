"""Answers to identical requests: kept for a while, and generated once when asked together."""

import hashlib
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from app.core.config import CacheSettings
from app.core.metrics import Metrics
from app.llm.report import GenerationReport
from app.services.flights import Flight
from app.state.answers import AnswerStore

Generate = Callable[[Flight], Coroutine[Any, Any, GenerationReport]]
"""Generates an answer into a flight."""


class ResponseCache:
    """Serves kept answers, joins identical requests, and keeps new answers."""

    def __init__(self, settings: CacheSettings, metrics: Metrics, answers: AnswerStore) -> None:
        self._enabled = settings.enabled
        self._metrics = metrics
        self._flights: dict[str, Flight] = {}
        self._answers = answers
        metrics.cache_entries.set_function(lambda: len(answers))

    async def lookup(self, caller: str, key: str | None) -> Flight | None:
        """A caller's kept answer, as a generation that has ended.

        Args:
            caller: Id of the API key.
            key: From :func:`cache_key`; ``None`` for a request that wants no cache.
        """
        if key is None or not self._enabled:
            return None
        stored = await self._answers.find(key, caller)
        if stored is None:
            return None
        self._metrics.cache_requests.labels("hit").inc()
        return Flight.of(stored)

    def generate(self, caller: str, key: str | None, generate: Generate) -> Flight:
        """A new generation, or the one of the same key that is under way."""
        if key is None or not self._enabled:
            self._metrics.cache_requests.labels("bypass").inc()
            flight = Flight()
        elif joined := self._flights.get(key):
            self._metrics.cache_requests.labels("coalesced").inc()
            return joined
        else:
            self._metrics.cache_requests.labels("miss").inc()
            flight = self._flights[key] = Flight(partial(self._landed, caller, key))
        flight.start(generate(flight))
        return flight

    def _landed(self, caller: str, key: str, flight: Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        if (answer := flight.answer) is not None:
            self._answers.put(key, answer, caller)


def cache_key(*parts: Any) -> str:
    """SHA-256 of everything that decides an answer, and of who asks for it."""
    # Not as MessagePack, which has no integers above 64 bits; the schema of a tool may.
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
