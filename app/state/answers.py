"""Complete answers, kept for identical requests."""

from operator import attrgetter
from typing import Protocol

import msgspec

from app.core.cache import BoundedCache
from app.core.config import CacheSettings
from app.llm.report import GenerationReport, TokenLogprob


class GeneratedAnswer(msgspec.Struct, frozen=True):
    """What a generation came to.

    Attributes:
        logprobs: Log-probabilities of the text's tokens, where they were asked for.
        size: Bytes of memory that it takes, roughly.
    """

    text: str
    reasoning: str
    logprobs: list[TokenLogprob]
    report: GenerationReport
    size: int


class AnswerStore(Protocol):
    """Answers by owner and key; none of its methods fails."""

    async def find(self, key: str, owner: str) -> GeneratedAnswer | None:
        """An owner's answer, or ``None``; counts a hit or a miss."""

    def put(self, key: str, answer: GeneratedAnswer, owner: str) -> None:
        """Keep an answer from now, or very soon, on."""

    def statistics(self) -> dict[str, int]:
        """Size, bounds and look-ups since the start, for /status."""

    def __len__(self) -> int:
        """Answers that have not expired, as far as this process knows."""


class MemoryAnswers(BoundedCache[GeneratedAnswer]):
    """In this process."""

    def __init__(self, settings: CacheSettings) -> None:
        super().__init__(
            max_entries=settings.size,
            max_bytes=settings.max_bytes,
            ttl_seconds=settings.ttl_seconds,
            size_of=attrgetter("size"),
        )

    async def find(self, key: str, owner: str) -> GeneratedAnswer | None:
        """See :class:`AnswerStore`."""
        return self.get(key, owner)
