"""Answers kept under idempotency keys: isolation of callers, lifetime and bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core.config import IdempotencySettings
from app.core.metrics import Metrics
from app.state.idempotency import Claim, KeptAnswer, MemoryIdempotency
from app.utils.errors import IdempotencyKeyInUseError, IdempotencyKeyReusedError

TTL = 10.0
MAX_ENTRIES = 3


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Store:
    """A store with small bounds, its clock and its metrics."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        settings = IdempotencySettings(ttl_seconds=TTL, max_entries=MAX_ENTRIES, max_bytes=65_536)
        self.store = MemoryIdempotency(settings, self.metrics, self.clock)

    async def ask(self, key: str, body: str = "a", caller: str = "alice") -> bytes | None:
        """Send a request: a new one is executed, and a repeated one returns the kept answer."""
        claim = await self.store.claim(caller, key, body.encode())
        if isinstance(claim, KeptAnswer):
            return claim.body
        await claim.keep(KeptAnswer(200, (), f"{caller} {key} {body}".encode()))
        return None

    async def begin(self, key: str, body: str = "a", caller: str = "alice") -> Claim:
        """Begin a new request."""
        claim = await self.store.claim(caller, key, body.encode())
        assert isinstance(claim, Claim)
        return claim

    def counted(self) -> dict[str, float]:
        """The number of requests by result."""
        (family,) = self.metrics.idempotency_requests.collect()
        return {s.labels["result"]: s.value for s in family.samples if s.name.endswith("_total")}


@pytest.fixture
def store() -> Store:
    """An empty store."""
    return Store()


async def test_an_answer_is_kept_for_its_time(store: Store) -> None:
    """A repeated request gets the kept answer until its time to live has passed."""
    assert await store.ask("k") is None
    store.clock.now = TTL - 0.001
    assert await store.ask("k") == b"alice k a"
    store.clock.now = TTL
    assert await store.ask("k") is None


async def test_a_key_belongs_to_one_request(store: Store) -> None:
    """A different request with the same key is rejected, during the first one and afterwards."""
    claim = await store.begin("k")
    with pytest.raises(IdempotencyKeyReusedError):
        await store.ask("k", "b")
    await claim.keep(KeptAnswer(200, (), b"x"))
    with pytest.raises(IdempotencyKeyReusedError):
        await store.ask("k", "b")
    assert await store.ask("k") == b"x"


async def test_a_request_runs_once_at_a_time(store: Store) -> None:
    """A repeated request is rejected while the first one runs; a released key can be used again."""
    claim = await store.begin("k")
    with pytest.raises(IdempotencyKeyInUseError):
        await store.ask("k")
    await claim.release()
    assert await store.ask("k", "another request") is None


async def test_only_the_first_ending_of_a_claim_counts(store: Store) -> None:
    """A claim that has ended changes neither its answer nor another request's claim."""
    claim = await store.begin("k")
    await claim.keep(KeptAnswer(200, (), b"x"))
    await claim.release()
    await claim.keep(KeptAnswer(200, (), b"y"))
    assert await store.ask("k") == b"x"
    early = await store.begin("other")
    await early.release()
    later = await store.begin("other")
    await early.release()
    with pytest.raises(IdempotencyKeyInUseError):
        await store.ask("other")
    await later.release()


async def test_callers_have_bounds_of_their_own(store: Store) -> None:
    """A caller that exceeds max_entries loses its own oldest answers, and no other caller does."""
    await store.ask("k", caller="bob")
    for number in range(MAX_ENTRIES + 1):
        await store.ask(str(number))
    assert await store.ask("k", caller="bob") == b"bob k a"
    assert await store.ask("3") == b"alice 3 a"
    assert await store.ask("0") is None


async def test_what_fits_is_kept_and_no_more(store: Store) -> None:
    """An answer of max_body_bytes is kept, and one of a byte more is not."""
    for excess in (0, 1):
        claim = await store.begin(f"k{excess}")
        await claim.keep(KeptAnswer(200, (), b"x" * (claim.max_body_bytes + excess)))
    assert await store.ask("k0") is not None
    assert await store.ask("k1") is None


async def test_requests_are_counted_by_what_became_of_them(store: Store) -> None:
    """New, replayed, in-use and reused requests are each counted once."""
    await store.ask("k")
    await store.ask("k")
    await store.begin("running")
    for key, body in (("k", "b"), ("running", "a")):
        with pytest.raises((IdempotencyKeyInUseError, IdempotencyKeyReusedError)):
            await store.ask(key, body)
    assert store.counted() == {"new": 2, "replayed": 1, "in_use": 1, "reused": 1}


steps = st.tuples(
    st.sampled_from(["alice", "bob"]),
    st.sampled_from("xyz"),
    st.sampled_from("ab"),
    st.sampled_from(["keep", "hold", "end", "drop"]),
    st.floats(0, 4),
)


@given(st.lists(steps, max_size=60))
async def test_a_caller_never_gets_anothers_answer(
    sequence: list[tuple[str, str, str, str, float]],
) -> None:
    """After any sequence of requests each answer belongs to its caller and its request.

    One caller's requests do not change another's results: bob gets what he would get alone.
    """
    together, alone = Store(), Store()
    held: dict[int, dict[tuple[str, str], Claim]] = {id(together): {}, id(alone): {}}
    for caller, key, body, action, pause in sequence:
        seen = []
        for store in (together, alone):
            store.clock.now += pause
            if store is together or caller == "bob":
                seen.append(await _step(store, held[id(store)], caller, key, body, action))
        assert len(set(seen)) == 1
        if isinstance(seen[0], bytes):
            assert seen[0] == f"{caller} {key} {body}".encode()


async def _step(
    store: Store,
    held: dict[tuple[str, str], Claim],
    caller: str,
    key: str,
    body: str,
    action: str,
) -> bytes | str | None:
    if action in ("end", "drop") and (caller, key) in held:
        claim = held.pop((caller, key))
        await claim.release()
        return None
    try:
        if action == "keep":
            return await store.ask(key, body, caller)
        found = await store.store.claim(caller, key, body.encode())
    except (IdempotencyKeyInUseError, IdempotencyKeyReusedError) as error:
        return error.code
    if isinstance(found, KeptAnswer):
        return found.body
    held[caller, key] = found
    return None
