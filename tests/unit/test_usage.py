"""What each key has used, by the day, and the budgets that end one."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from app.core.config.security import NamedKey, SecuritySettings
from app.core.metrics import Metrics
from app.core.security import KeyRing
from app.core.usage import UsageLedger
from app.utils.errors import TokenBudgetExceededError

NOON = datetime(2026, 3, 31, 12, tzinfo=UTC).timestamp()
DAY = 86_400
BUDGET = 100


class Books:
    """A ledger for a caller with a budget and one without, and its clock."""

    def __init__(self) -> None:
        self.now = NOON
        limited = NamedKey(name="limited", key=SecretStr("a"), daily_tokens=BUDGET)
        self.keys = KeyRing(
            SecuritySettings(api_keys=[limited, NamedKey(name="free", key=SecretStr("b"))])
        )
        self.limited, self.free = (p.key_id for p in self.keys.principals)
        self.metrics = Metrics()
        self.ledger = UsageLedger(self.keys, self.metrics, lambda: self.now)


@pytest.fixture
def books() -> Books:
    """See :class:`Books`."""
    return Books()


def test_a_spent_budget_ends_the_day(books: Books) -> None:
    """At its budget a caller is refused until midnight UTC; one token before, it is not."""
    books.ledger.add_tokens(books.limited, 50, 49)
    books.ledger.check(books.limited)
    books.ledger.add_tokens(books.limited, 0, 1)
    with pytest.raises(TokenBudgetExceededError) as caught:
        books.ledger.check(books.limited)
    assert caught.value.retry_after == DAY / 2
    refused = books.metrics.registry.get_sample_value("rate_limited_total", {"reason": "budget"})
    assert refused == 1
    # Whoever waits as long as it was told is let in, and not a moment earlier.
    books.now += caught.value.retry_after - 0.001
    with pytest.raises(TokenBudgetExceededError):
        books.ledger.check(books.limited)
    books.now += 0.001
    books.ledger.check(books.limited)


def test_a_caller_without_a_budget_is_never_refused(books: Books) -> None:
    """Neither another's use nor its own ends the day of a key without a budget."""
    for caller in (books.limited, books.free):
        books.ledger.add_tokens(caller, 10**9, 10**9)
    books.ledger.check(books.free)


def test_a_new_budget_counts_at_once(books: Books) -> None:
    """Keys that are replaced bring their budgets; what was used today stays used."""
    books.ledger.add_tokens(books.limited, BUDGET, 0)
    for budget, refused in ((BUDGET + 1, False), (1, True)):
        key = NamedKey(name="limited", key=SecretStr("a"), daily_tokens=budget)
        books.keys.replace(SecuritySettings(api_keys=[key]))
        if refused:
            with pytest.raises(TokenBudgetExceededError):
                books.ledger.check(books.limited)
        else:
            books.ledger.check(books.limited)


def test_what_is_told_does_not_change_afterwards(books: Books) -> None:
    """An account that was asked for is a copy."""
    account = books.ledger.of(books.free)
    books.ledger.add_tokens(books.free, 1, 1)
    books.ledger.add_request(books.free)
    assert (account.today.tokens, account.total.requests) == (0, 0)


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 50), st.integers(0, 50), st.floats(0, 2 * DAY))
    )
)
def test_the_books_balance(entries: list[tuple[bool, int, int, float]]) -> None:
    """Each caller's day and total are the sums of its own entries, whenever they were made."""
    books = Books()
    made: list[tuple[str, int, int, int]] = []
    for is_limited, prompt, completion, pause in entries:
        books.now += pause
        caller = books.limited if is_limited else books.free
        books.ledger.add_request(caller)
        books.ledger.add_tokens(caller, prompt, completion)
        made.append((caller, int(books.now // DAY), prompt, completion))
    for caller in (books.limited, books.free):
        account = books.ledger.of(caller)
        own = [entry for entry in made if entry[0] == caller]
        today = [entry for entry in own if entry[1] == int(books.now // DAY)]
        for usage, counted in ((account.total, own), (account.today, today)):
            assert usage.requests == len(counted)
            assert usage.prompt_tokens == sum(entry[2] for entry in counted)
            assert usage.completion_tokens == sum(entry[3] for entry in counted)
