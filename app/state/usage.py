"""Usage by API key, and daily token budgets."""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime

from app.core.metrics import Metrics
from app.core.security import KeyRing
from app.utils.errors import TokenBudgetExceededError

_DAY_SECONDS = 86_400


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


class UsageLedger:
    """Counts requests and tokens by API key in this process, and enforces the daily budgets.

    ``clock`` is Unix time, and ``since`` the time at which counting began.
    """

    def __init__(
        self, keys: KeyRing, metrics: Metrics, clock: Callable[[], float] = time.time
    ) -> None:
        self._keys = keys
        self._metrics = metrics
        self.clock = clock
        self.since = clock()
        self._day = self.today
        self._today: defaultdict[str, Usage] = defaultdict(Usage)
        self._total: defaultdict[str, Usage] = defaultdict(Usage)

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
        """Check that a caller's budget is not spent; running requests may exceed it.

        Raises:
            TokenBudgetExceededError: The budget of the day is spent.
        """
        principal = self._keys.find(caller)
        if principal is None or principal.daily_tokens is None:
            return
        today, _ = await self.of(caller)
        if today.tokens >= principal.daily_tokens:
            self._metrics.rate_limited.labels("budget").inc()
            raise TokenBudgetExceededError(retry_after=self.seconds_left)

    def add_request(self, caller: str) -> None:
        """Count an answer that has begun."""
        self._add(caller, 1, 0, 0)

    def add_tokens(self, caller: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of a generation that has ended, successfully or not."""
        self._add(caller, 0, prompt_tokens, completion_tokens)

    def _add(self, caller: str, requests: int, prompt_tokens: int, completion_tokens: int) -> None:
        for usage in self._own(caller):
            usage.requests += requests
            usage.prompt_tokens += prompt_tokens
            usage.completion_tokens += completion_tokens
