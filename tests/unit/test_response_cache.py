"""Answers kept for identical requests, and generations that are shared."""

import asyncio

import pytest

from app.core.config import CacheSettings
from app.core.metrics import Metrics
from app.llm.report import GenerationReport
from app.services.answers import Answer
from app.services.flights import Flight
from app.services.response_cache import ResponseCache, cache_key
from app.state.answers import MemoryAnswers
from app.utils.errors import DeadlineExceededError, InternalError, OverloadedError


def test_keys_differ_where_anything_differs() -> None:
    """No two different requests share a key."""
    keys = {
        cache_key("alice", "m", {"temperature": 0}, "ab", "c"),
        cache_key("bob", "m", {"temperature": 0}, "ab", "c"),
        cache_key("alice", "m", {"temperature": 1}, "ab", "c"),
        cache_key("alice", "m", {"temperature": 0}, "a", "bc"),
    }
    assert len(keys) == 4


REPORT = GenerationReport("stop", prompt_tokens=7, completion_tokens=3)


class Generation:
    """A generation that the test lets go on, piece by piece."""

    def __init__(self, pieces: int = 3) -> None:
        self.started = 0
        self.closed = 0
        self.go = asyncio.Event()
        self._pieces = pieces

    async def __call__(self, flight: Flight) -> GenerationReport:
        self.started += 1
        try:
            flight.accepted()
            await self.go.wait()
            for i in range(self._pieces):
                flight.add(f"{i}")
                await asyncio.sleep(0)
        finally:
            self.closed += 1
        return REPORT


def make_cache() -> tuple[ResponseCache, Metrics]:
    """An empty response cache."""
    metrics = Metrics()
    settings = CacheSettings()
    return ResponseCache(settings, metrics, MemoryAnswers(settings)), metrics


async def read(flight: Flight) -> str:
    """The whole answer."""
    answer = Answer("m", flight)
    try:
        await answer.until_accepted()
        pieces = [piece async for _, piece in answer.pieces()]
        assert pieces.pop() is None
        return "".join(map(str, pieces))
    finally:
        await answer.aclose()


async def test_identical_requests_run_once_and_all_get_the_answer() -> None:
    """Fifty readers of one key share one generation, and the answer is kept."""
    cache, metrics = make_cache()
    generation = Generation()
    readers = [asyncio.create_task(read(cache.generate("me", "k", generation))) for _ in range(50)]
    await asyncio.sleep(0)
    generation.go.set()
    assert await asyncio.gather(*readers) == ["012"] * 50
    assert generation.started == 1
    stored = await cache.lookup("me", "k")
    assert stored is not None
    assert await read(stored) == "012"
    value = metrics.registry.get_sample_value
    assert value("response_cache_requests_total", {"result": "miss"}) == 1
    assert value("response_cache_requests_total", {"result": "coalesced"}) == 49
    assert value("response_cache_requests_total", {"result": "hit"}) == 1
    assert value("response_cache_entries") == 1


async def test_the_first_reader_may_leave() -> None:
    """Whoever asked first has no more right to the generation than the others."""
    cache, _ = make_cache()
    generation = Generation()
    first = asyncio.create_task(read(cache.generate("me", "k", generation)))
    await asyncio.sleep(0)
    second = asyncio.create_task(read(cache.generate("me", "k", generation)))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    generation.go.set()
    assert await second == "012"
    assert generation.started == 1


async def test_the_last_reader_to_leave_ends_the_generation() -> None:
    """Nobody left: the generation is cancelled at once, nothing is kept, a new one starts."""
    cache, _ = make_cache()
    generation = Generation()
    readers = [asyncio.create_task(read(cache.generate("me", "k", generation))) for _ in range(3)]
    await asyncio.sleep(0.01)
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    late = asyncio.create_task(read(cache.generate("me", "k", generation)))
    await asyncio.sleep(0.01)
    assert (generation.started, generation.closed) == (2, 1)
    generation.go.set()
    assert await late == "012"


async def test_an_error_reaches_every_reader_and_is_not_kept() -> None:
    """All who wait get the error; the next request tries again."""
    cache, _ = make_cache()

    async def failing(flight: Flight) -> GenerationReport:
        raise OverloadedError

    results = await asyncio.gather(
        *(read(cache.generate("me", "k", failing)) for _ in range(3)), return_exceptions=True
    )
    assert [type(r) for r in results] == [OverloadedError] * 3
    assert await cache.lookup("me", "k") is None


async def test_an_answer_that_breaks_off_is_not_kept() -> None:
    """Its readers get the pieces before the fault, then the fault; nobody gets them later."""
    cache, _ = make_cache()

    async def cut(flight: Flight) -> GenerationReport:
        flight.add("half")
        raise InternalError

    answer = Answer("m", cache.generate("me", "k", cut))
    await answer.until_accepted()
    pieces = answer.pieces()
    assert await anext(pieces) == (answer, "half")
    with pytest.raises(InternalError):
        await anext(pieces)
    await answer.aclose()
    assert await cache.lookup("me", "k") is None


async def test_no_key_means_no_cache() -> None:
    """A request that wants no cache shares nothing and leaves nothing."""
    cache, metrics = make_cache()
    generation = Generation()
    generation.go.set()
    assert await read(cache.generate("me", None, generation)) == "012"
    assert await read(cache.generate("me", None, generation)) == "012"
    assert generation.started == 2
    assert metrics.registry.get_sample_value("response_cache_entries") == 0


async def test_each_kept_answer_has_an_id_of_its_own() -> None:
    """Two answers from the cache are told apart."""
    cache, _ = make_cache()
    generation = Generation()
    generation.go.set()
    await read(cache.generate("me", "k", generation))
    first, second = await cache.lookup("me", "k"), await cache.lookup("me", "k")
    assert first is not None
    assert second is not None
    assert first.id != second.id


async def test_switched_off_it_keeps_nothing() -> None:
    """With cache.enabled false a look-up never hits."""
    settings = CacheSettings(enabled=False)
    cache = ResponseCache(settings, Metrics(), MemoryAnswers(settings))
    assert await cache.lookup("me", "k") is None


@pytest.mark.parametrize("pieces", [0, 1, 200])
async def test_a_slow_reader_gets_everything(pieces: int) -> None:
    """A reader that comes late, or lags, misses nothing."""
    cache, _ = make_cache()
    generation = Generation(pieces)
    early = Answer("m", cache.generate("me", "k", generation))
    await early.until_accepted()
    late = asyncio.create_task(read(cache.generate("me", "k", generation)))
    generation.go.set()
    expected = "".join(str(i) for i in range(pieces))
    assert await late == expected
    assert "".join([str(piece) async for _, piece in early.pieces() if piece]) == expected
    await early.aclose()


async def test_a_hit_is_counted_and_its_report_complete() -> None:
    """A kept answer tells the tokens and the finish reason of the generation it came from."""
    cache, metrics = make_cache()
    generation = Generation()
    generation.go.set()
    await read(cache.generate("me", "k", generation))
    stored = await cache.lookup("me", "k")
    assert stored is not None
    assert stored.report == REPORT
    value = metrics.registry.get_sample_value
    assert value("response_cache_requests_total", {"result": "hit"}) == 1


async def test_a_place_that_fails_stops_the_preparation() -> None:
    """A deadline that passes while the prompt is prepared reaches the reader at once."""
    cache, _ = make_cache()

    async def preparing(flight: Flight) -> GenerationReport:
        await asyncio.Event().wait()
        return REPORT

    flight = cache.generate("me", "k", preparing)
    reader = asyncio.create_task(read(flight))
    await asyncio.sleep(0)
    flight.failed(DeadlineExceededError())
    # A request that comes in the same moment is not given up with it.
    assert cache.generate("me", "k", preparing) is not flight
    with pytest.raises(DeadlineExceededError):
        await reader


async def test_other_keys_do_not_wait_for_each_other() -> None:
    """Two different requests are two generations."""
    cache, _ = make_cache()
    slow, quick = Generation(), Generation()
    waiting = asyncio.create_task(read(cache.generate("me", "a", slow)))
    quick.go.set()
    assert await read(cache.generate("me", "b", quick)) == "012"
    assert not waiting.done()
    slow.go.set()
    assert await waiting == "012"


async def test_a_request_after_a_failure_is_a_flight_of_its_own() -> None:
    """A failed generation is not joined by those who come after it."""
    cache, _ = make_cache()

    async def failing(flight: Flight) -> GenerationReport:
        raise OverloadedError

    with pytest.raises(OverloadedError):
        await read(cache.generate("me", "k", failing))
    generation = Generation()
    generation.go.set()
    assert await read(cache.generate("me", "k", generation)) == "012"
