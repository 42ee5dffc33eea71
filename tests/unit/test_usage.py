"""Usage by key and day, and daily budgets."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from app.core.config.security import NamedKey, SecuritySettings
from app.core.metrics import Metrics
from app.core.rate_limit import TokenBucketRateLimiter
from app.core.security import KeyRing
from app.state.usage import UsageLedger
from app.utils.errors import RateLimitExceededError, TokenBudgetExceededError

NOON = datetime(2026, 3, 31, 12, tzinfo=UTC).timestamp()
DAY = 86_400
BUDGET = 100


class Books:
    """A ledger with a clock, a key with a budget and a key without one."""

    def __init__(self) -> None:
        self.now = NOON
        limited = NamedKey(name="limited", key=SecretStr("a"), daily_tokens=BUDGET)
        slow = NamedKey(name="slow", key=SecretStr("c"), tokens_per_minute=60, max_concurrent=2)
        free = NamedKey(name="free", key=SecretStr("b"))
        self.keys = KeyRing(SecuritySettings(api_keys=[limited, free, slow]), are_told=True)
        self.limited, self.free, self.slow = (p.key_id for p in self.keys.principals)
        self.metrics = Metrics()
        self.ledger = UsageLedger(self.keys, self.metrics, lambda: self.now, self._timed)

    def _timed(self, own: TokenBucketRateLimiter) -> TokenBucketRateLimiter:
        own.clock = lambda: self.now
        return own

    def counted(self, name: str, **labels: str) -> float:
        """A metric's value."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def books() -> Books:
    """A ledger without usage."""
    return Books()


async def test_a_spent_budget_ends_the_day(books: Books) -> None:
    """A caller that has used its whole budget is rejected until midnight UTC."""
    books.ledger.add_tokens(books.limited, 50, 49)
    await books.ledger.check(books.limited)
    books.ledger.add_tokens(books.limited, 0, 1)
    with pytest.raises(TokenBudgetExceededError) as caught:
        await books.ledger.check(books.limited)
    assert caught.value.retry_after == DAY / 2
    assert books.counted("rate_limited_total", reason="budget") == 1
    # A caller is accepted again after retry_after seconds, and not before.
    books.now += caught.value.retry_after - 0.001
    with pytest.raises(TokenBudgetExceededError):
        await books.ledger.check(books.limited)
    books.now += 0.001
    await books.ledger.check(books.limited)


async def test_a_caller_without_a_budget_is_never_refused(books: Books) -> None:
    """A key without a budget is not rejected, whatever it and other keys have used."""
    for caller in (books.limited, books.free):
        books.ledger.add_tokens(caller, 10**9, 10**9)
    await books.ledger.check(books.free)


async def test_a_new_budget_counts_at_once(books: Books) -> None:
    """A replaced key's budget applies at once, to the usage of the whole day."""
    books.ledger.add_tokens(books.limited, BUDGET, 0)
    for budget, refused in ((BUDGET + 1, False), (1, True)):
        key = NamedKey(name="limited", key=SecretStr("a"), daily_tokens=budget)
        books.keys.replace(SecuritySettings(api_keys=[key]))
        if refused:
            with pytest.raises(TokenBudgetExceededError):
                await books.ledger.check(books.limited)
        else:
            await books.ledger.check(books.limited)


async def test_a_minutes_tokens_refill_steadily(books: Books) -> None:
    """A caller over its tokens of a minute is 429 until what it used too much is refilled."""
    books.ledger.add_tokens(books.slow, 50, 10)
    await books.ledger.check(books.slow)
    books.ledger.add_tokens(books.slow, 0, 30)
    with pytest.raises(RateLimitExceededError) as caught:
        await books.ledger.check(books.slow)
    assert caught.value.retry_after == 30
    assert books.counted("rate_limited_total", reason="tokens") == 1
    books.now += 29.9
    with pytest.raises(RateLimitExceededError):
        await books.ledger.check(books.slow)
    books.now += 0.1
    for _ in range(3):
        await books.ledger.check(books.slow)


async def test_a_key_has_so_many_answers_at_once(books: Books) -> None:
    """A caller with its most answers under way is 429 until one of them has ended."""
    async with books.ledger.generating(books.slow):
        await books.ledger.check(books.slow)
        async with books.ledger.generating(books.slow):
            for _ in range(3):
                with pytest.raises(RateLimitExceededError):
                    await books.ledger.check(books.slow)
            await books.ledger.check(books.free)
        await books.ledger.check(books.slow)
    assert books.counted("rate_limited_total", reason="concurrency") == 3


async def test_only_names_of_the_configuration_are_labels(books: Books) -> None:
    """Tokens are counted under the key's name, and under `other` once it is not accepted."""
    books.ledger.add_tokens(books.free, 2, 3)
    books.keys.replace(SecuritySettings())
    books.ledger.add_tokens(books.free, 5, 8)
    books.ledger.add_tokens("unknown", 13, 21)
    assert books.counted("llm_tokens_total", key="free") == 5
    assert books.counted("llm_tokens_total", key="other") == 47


def test_metrics_that_anybody_may_read_name_no_key() -> None:
    """Where the metrics need no key every key is `other` in them."""
    keys = KeyRing(SecuritySettings())
    assert [keys.label(p.key_id) for p in keys.principals] == ["other"]


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 50), st.integers(0, 50), st.floats(0, 2 * DAY))
    )
)
async def test_the_books_balance(entries: list[tuple[bool, int, int, float]]) -> None:
    """The day and the total of each caller are the sums of its entries."""
    books = Books()
    made: list[tuple[str, int, int, int]] = []
    for is_limited, prompt, completion, pause in entries:
        books.now += pause
        caller = books.limited if is_limited else books.free
        books.ledger.add_request(caller)
        books.ledger.add_tokens(caller, prompt, completion)
        made.append((caller, int(books.now // DAY), prompt, completion))
    for caller in (books.limited, books.free):
        day, total = await books.ledger.of(caller)
        own = [entry for entry in made if entry[0] == caller]
        today = [entry for entry in own if entry[1] == int(books.now // DAY)]
        for usage, counted in ((total, own), (day, today)):
            assert usage.requests == len(counted)
            assert usage.prompt_tokens == sum(entry[2] for entry in counted)
            assert usage.completion_tokens == sum(entry[3] for entry in counted)
