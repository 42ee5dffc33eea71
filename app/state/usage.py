"""Usage by API key, and its limits: tokens by day and minute, and answers at once."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, date, datetime

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage

from app.core.metrics import Metrics
from app.core.rate_limit import Buckets, TokenBucketRateLimiter
from app.core.security import KeyRing
from app.utils.errors import RateLimitExceededError, TokenBudgetExceededError

_DAY_SECONDS = 86_400
_MINUTE_SECONDS = 60
# How long an answer takes that is to end before a caller's next one may begin; a guess.
_CONCURRENCY_RETRY_SECONDS = 1.0


@dataclass(slots=True)
class Usage:
    """Tokens of a period, and the answers begun in it, including those from the response cache."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens; a budget limits this sum."""
        return self.prompt_tokens + self.completion_tokens


this_request: ContextVar[list[int] | None] = ContextVar("this_request", default=None)
"""Prompt and completion tokens of the HTTP request that is being served."""


class UsageLedger:
    """Counts requests and tokens by API key in this process, and enforces the keys' limits.

    ``clock`` is Unix time, and ``since`` the time at which counting began.

    Args:
        share: Makes the buckets that copies of the service share out of this process's own.
    """

    def __init__(
        self,
        keys: KeyRing,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        share: Callable[[TokenBucketRateLimiter], Buckets] = lambda own: own,
    ) -> None:
        self._keys = keys
        self._metrics = metrics
        self.clock = clock
        self.since = clock()
        self._day = self.today
        self._today: defaultdict[str, Usage] = defaultdict(Usage)
        self._total: defaultdict[str, Usage] = defaultdict(Usage)
        self._minute = share(TokenBucketRateLimiter(MemoryStorage()))
        self._generating: Counter[str] = Counter()

    async def of(self, caller: str) -> tuple[Usage, Usage]:
        """A caller's usage today (UTC) and since counting began."""
        return self._own(caller)

    def _own(self, caller: str) -> tuple[Usage, Usage]:
        """What this process has counted; both go on counting."""
        if self._day != self.today:
            self._day = self.today
            self._today.clear()
        return self._today[caller], self._total[caller]

    @property
    def today(self) -> date:
        """The current day in UTC."""
        return datetime.fromtimestamp(self.clock(), UTC).date()

    @property
    def seconds_left(self) -> int:
        """Seconds until midnight UTC, rounded up so that waiting them reaches the next day."""
        return math.ceil(_DAY_SECONDS - self.clock() % _DAY_SECONDS)

    async def check(self, caller: str) -> None:
        """Check that a caller may have one answer more generated.

        Running requests may exceed its budgets, since their tokens count at their end.

        Raises:
            TokenBudgetExceededError: The budget of the day is spent.
            RateLimitExceededError: That of the minute is, or too many answers are generated.
        """
        principal = self._keys.find(caller)
        if principal is None:
            return
        if principal.daily_tokens is not None:
            today, _ = await self.of(caller)
            if today.tokens >= principal.daily_tokens:
                self._metrics.rate_limited.labels("budget").inc()
                raise TokenBudgetExceededError(retry_after=self.seconds_left)
        if principal.tokens_per_minute is not None:
            bucket = _minute_bucket(principal.tokens_per_minute, caller)
            is_free, full_in = await self._minute.take(*bucket, cost=0)
            if not is_free:
                self._metrics.rate_limited.labels("tokens").inc()
                raise RateLimitExceededError(
                    "This API key has used its tokens of a minute; see Retry-After.",
                    retry_after=full_in - _MINUTE_SECONDS,
                )
        # This is last, so that nothing comes between it and generating().
        most = principal.max_concurrent
        if most is not None and self._generating[caller] >= most:
            raise self._too_many(most)

    def _too_many(self, most: int) -> RateLimitExceededError:
        self._metrics.rate_limited.labels("concurrency").inc()
        return RateLimitExceededError(
            f"This API key has its {most} answers at once under way; see Retry-After.",
            retry_after=_CONCURRENCY_RETRY_SECONDS,
        )

    @asynccontextmanager
    async def generating(self, caller: str) -> AsyncIterator[None]:
        """Count an answer among those under way; directly after :meth:`check`.

        Raises:
            RateLimitExceededError: Those of other copies of the service are too many.
        """
        self._generating[caller] += 1
        try:
            yield
        finally:
            self._generating[caller] -= 1
            if not self._generating[caller]:
                del self._generating[caller]

    def add_request(self, caller: str) -> None:
        """Count an answer that has begun."""
        self._add(caller, 1, 0, 0)

    def add_tokens(self, caller: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of a generation that has ended, successfully or not."""
        self._add(caller, 0, prompt_tokens, completion_tokens)
        principal, tokens = self._keys.find(caller), prompt_tokens + completion_tokens
        self._metrics.key_tokens.labels(self._keys.label(caller)).inc(tokens)
        if principal is not None and principal.tokens_per_minute is not None:
            self._minute.owe(*_minute_bucket(principal.tokens_per_minute, caller), tokens)
        if (request := this_request.get()) is not None:
            request[:] = request[0] + prompt_tokens, request[1] + completion_tokens

    def _add(self, caller: str, requests: int, prompt_tokens: int, completion_tokens: int) -> None:
        for usage in self._own(caller):
            usage.requests += requests
            usage.prompt_tokens += prompt_tokens
            usage.completion_tokens += completion_tokens


def _minute_bucket(tokens: int, caller: str) -> tuple[RateLimitItemPerMinute, str]:
    return RateLimitItemPerMinute(tokens), f"tokens:{caller}"
