"""Answers kept for identical requests, and generations that are shared."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from app.core.config import CacheSettings
from app.core.metrics import Metrics
from app.llm.generator import GenerationReport
from app.services.response_cache import ResponseCache, cache_key
from app.utils.errors import OverloadedError


def test_keys_differ_where_anything_differs() -> None:
    """No two different requests share a key."""
    keys = {
        cache_key("alice", "m", {"temperature": 0}, "ab", "c"),
        cache_key("bob", "m", {"temperature": 0}, "ab", "c"),
        cache_key("alice", "m", {"temperature": 1}, "ab", "c"),
        cache_key("alice", "m", {"temperature": 0}, "a", "bc"),
    }
    assert len(keys) == 4


class Generation:
    """A generation that the test lets go on, piece by piece."""

    def __init__(self, pieces: int = 3) -> None:
        self.started = 0
        self.closed = 0
        self.go = asyncio.Event()
        self._pieces = pieces

    async def __call__(self, report: GenerationReport) -> AsyncGenerator[str, None]:
        self.started += 1
        try:
            yield ""
            await self.go.wait()
            for i in range(self._pieces):
                yield f"{i}"
            report.finish_reason = "stop"
        finally:
            self.closed += 1


def make_cache() -> tuple[ResponseCache, Metrics]:
    """An empty response cache."""
    metrics = Metrics()
    return ResponseCache(CacheSettings(), metrics), metrics


async def read(pieces: AsyncGenerator[str, None]) -> str:
    """The whole answer."""
    return "".join([piece async for piece in pieces])


async def test_identical_requests_run_once_and_all_get_the_answer() -> None:
    """Fifty readers of one key share one generation, and the answer is kept."""
    cache, metrics = make_cache()
    generation = Generation()
    readers = [asyncio.create_task(read(cache.generate("k", generation)[1])) for _ in range(50)]
    await asyncio.sleep(0)
    generation.go.set()
    assert await asyncio.gather(*readers) == ["012"] * 50
    assert generation.started == 1
    stored = cache.lookup("k")
    assert stored is not None
    assert stored.text == "012"
    value = metrics.registry.get_sample_value
    assert value("response_cache_requests_total", {"result": "miss"}) == 1
    assert value("response_cache_requests_total", {"result": "coalesced"}) == 49
    assert value("response_cache_requests_total", {"result": "hit"}) == 1
    assert value("response_cache_entries") == 1


async def test_the_first_reader_may_leave() -> None:
    """Whoever asked first has no more right to the generation than the others."""
    cache, _ = make_cache()
    generation = Generation()
    first = asyncio.create_task(read(cache.generate("k", generation)[1]))
    await asyncio.sleep(0)
    second = asyncio.create_task(read(cache.generate("k", generation)[1]))
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
    readers = [asyncio.create_task(read(cache.generate("k", generation)[1])) for _ in range(3)]
    await asyncio.sleep(0.01)
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    late = asyncio.create_task(read(cache.generate("k", generation)[1]))
    await asyncio.sleep(0.01)
    assert (generation.started, generation.closed) == (2, 1)
    generation.go.set()
    assert await late == "012"


async def test_an_error_reaches_every_reader_and_is_not_kept() -> None:
    """All who wait get the error; the next request tries again."""
    cache, _ = make_cache()

    async def failing(report: GenerationReport) -> AsyncGenerator[str, None]:
        yield ""
        raise OverloadedError

    results = await asyncio.gather(
        *(read(cache.generate("k", failing)[1]) for _ in range(3)), return_exceptions=True
    )
    assert [type(r) for r in results] == [OverloadedError] * 3
    assert cache.lookup("k") is None


async def test_an_incomplete_answer_is_not_kept() -> None:
    """Without a finish reason there is no answer to keep."""
    cache, _ = make_cache()

    async def cut(report: GenerationReport) -> AsyncGenerator[str, None]:
        yield ""
        yield "half"

    assert await read(cache.generate("k", cut)[1]) == "half"
    assert cache.lookup("k") is None


async def test_no_key_means_no_cache() -> None:
    """A request that wants no cache shares nothing and leaves nothing."""
    cache, _ = make_cache()
    generation = Generation()
    generation.go.set()
    assert await read(cache.generate(None, generation)[1]) == "012"
    assert await read(cache.generate(None, generation)[1]) == "012"
    assert generation.started == 2
    assert cache.statistics().entries == 0


async def test_a_kept_answers_report_is_the_readers_own() -> None:
    """Each answer from the cache has an id of its own."""
    cache, _ = make_cache()
    generation = Generation()
    generation.go.set()
    await read(cache.generate("k", generation)[1])
    first, second = cache.lookup("k"), cache.lookup("k")
    assert first is not None
    assert second is not None
    assert first.report.id != second.report.id


def test_switched_off_it_keeps_nothing() -> None:
    """With cache.enabled false a look-up never hits."""
    cache = ResponseCache(CacheSettings(enabled=False), Metrics())
    assert cache.lookup("k") is None


@pytest.mark.parametrize("pieces", [0, 1, 200])
async def test_a_slow_reader_gets_everything(pieces: int) -> None:
    """A reader that comes late, or lags, misses nothing."""
    cache, _ = make_cache()
    generation = Generation(pieces)
    early = cache.generate("k", generation)[1]
    assert await anext(early) == ""
    late = cache.generate("k", generation)[1]
    generation.go.set()
    await asyncio.sleep(0.01)
    expected = "".join(str(i) for i in range(pieces))
    assert await read(late) == expected
    assert await read(early) == expected


async def test_a_hit_is_counted_and_its_report_complete() -> None:
    """A kept answer tells the tokens and the finish reason of the generation it came from."""
    cache, metrics = make_cache()

    async def generate(report: GenerationReport) -> AsyncGenerator[str, None]:
        yield ""
        report.prompt_tokens, report.completion_tokens = 7, 3
        yield "text"
        report.finish_reason = "length"

    await read(cache.generate("k", generate)[1])
    stored = cache.lookup("k")
    assert stored is not None
    report = stored.report
    assert (report.prompt_tokens, report.completion_tokens, report.finish_reason) == (
        7,
        3,
        "length",
    )
    value = metrics.registry.get_sample_value
    assert value("response_cache_requests_total", {"result": "hit"}) == 1


async def test_other_keys_do_not_wait_for_each_other() -> None:
    """Two different requests are two generations."""
    cache, _ = make_cache()
    slow, quick = Generation(), Generation()
    waiting = asyncio.create_task(read(cache.generate("a", slow)[1]))
    quick.go.set()
    assert await read(cache.generate("b", quick)[1]) == "012"
    assert not waiting.done()
    slow.go.set()
    assert await waiting == "012"


async def test_a_request_after_a_failure_is_a_flight_of_its_own() -> None:
    """A failed generation is not joined by those who come after it."""
    cache, _ = make_cache()

    async def failing(report: GenerationReport) -> AsyncGenerator[str, None]:
        yield ""
        raise OverloadedError

    with pytest.raises(OverloadedError):
        await read(cache.generate("k", failing)[1])
    generation = Generation()
    generation.go.set()
    assert await read(cache.generate("k", generation)[1]) == "012"
