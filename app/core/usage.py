"""What each key has used, and the budgets that end its day.

Kept in this process, as the rate limits are: a restart begins anew.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta

from app.core.metrics import Metrics
from app.core.security import KeyRing
from app.utils.errors import TokenBudgetExceededError


@dataclass(slots=True)
class Usage:
    """What was used in some time.

    Attributes:
        requests: Answers begun, those from the response cache included.
        prompt_tokens: Tokens read by the model.
        completion_tokens: Tokens generated.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens together, which is what budgets limit."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class Account:
    """One caller's usage.

    Attributes:
        day: The day of ``today``, in UTC.
        today: Since midnight UTC.
        total: Since the service started.
    """

    day: date
    today: Usage = field(default_factory=Usage)
    total: Usage = field(default_factory=Usage)


class UsageLedger:
    """Counts requests and tokens by caller; refuses those whose budget for the day is spent.

    Attributes:
        clock: Unix time.
        since: When counting began.
    """

    def __init__(
        self, keys: KeyRing, metrics: Metrics, clock: Callable[[], float] = time.time
    ) -> None:
        """Begin with nothing used.

        Args:
            keys: Knows the budgets.
            metrics: Count the refusals.
            clock: Unix time.
        """
        self._keys = keys
        self._metrics = metrics
        self.clock = clock
        self._accounts: dict[str, Account] = {}
        self.since = clock()

    def _account(self, caller: str) -> Account:
        today = self.today
        account = self._accounts.setdefault(caller, Account(today))
        if account.day != today:
            account.day, account.today = today, Usage()
        return account

    @property
    def today(self) -> date:
        """The day in UTC."""
        return datetime.fromtimestamp(self.clock(), UTC).date()

    @property
    def seconds_left(self) -> int:
        """Until the day ends, rounded up: whoever waits that long is in the next one."""
        midnight = datetime.combine(self.today + timedelta(days=1), datetime.min.time(), tzinfo=UTC)
        return math.ceil(midnight.timestamp() - self.clock())

    def check(self, caller: str) -> None:
        """Refuse a caller whose budget is spent.

        What has begun may end: the budget can be passed by the requests that ran when it was
        reached.

        Raises:
            TokenBudgetExceededError: Until the day ends.
        """
        principal = self._keys.find(caller)
        if principal is None or principal.daily_tokens is None:
            return
        if self._account(caller).today.tokens >= principal.daily_tokens:
            self._metrics.rate_limited.labels("budget").inc()
            raise TokenBudgetExceededError(retry_after=self.seconds_left)

    def add_request(self, caller: str) -> None:
        """An answer has begun."""
        account = self._account(caller)
        for usage in (account.today, account.total):
            usage.requests += 1

    def add_tokens(self, caller: str, prompt_tokens: int, completion_tokens: int) -> None:
        """A generation has ended, in whatever way."""
        account = self._account(caller)
        for usage in (account.today, account.total):
            usage.prompt_tokens += prompt_tokens
            usage.completion_tokens += completion_tokens

    def of(self, caller: str) -> Account:
        """A caller's usage so far."""
        account = self._account(caller)
        return replace(account, today=replace(account.today), total=replace(account.total))
