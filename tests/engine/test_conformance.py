"""What every backend must do; a new backend is a row in :data:`BACKENDS`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from app.core.config import ModelSettings
from app.llm.engine.base import Backend, GenerationRequest, SamplingParams, TokenEvent
from app.llm.loader import load_backend

GREEDY = SamplingParams(temperature=0)
MAX_RUNNING = 32
PROMPT = [10, 11, 12, 13, 14]


def _load(settings: ModelSettings) -> Backend:
    return load_backend(
        settings, max_running=MAX_RUNNING, echo_step_seconds=0, token=None, progress=lambda _: None
    )


def _echo(_: Path) -> Backend:
    return _load(ModelSettings(engine="echo"))


def _transformers(tiny: Path) -> Backend:
    return _load(
        ModelSettings(source="local", name=str(tiny), engine="transformers", dtype="float32")
    )


BACKENDS: dict[str, Callable[[Path], Backend]] = {"echo": _echo, "transformers": _transformers}


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest, tiny_model_dir: Path) -> Backend:
    """Each backend in turn."""
    return BACKENDS[request.param](tiny_model_dir)


@pytest.fixture(autouse=True)
def _leaves_nothing(backend: Backend) -> object:
    """Whatever a test does, no request and no work is left behind."""
    yield
    for _ in range(3):
        if backend.has_work():
            backend.step()
    assert not backend.has_work()
    assert backend.stats().running == 0


def request(
    name: str,
    prompt: Sequence[int] = PROMPT,
    max_tokens: int = 8,
    sampling: SamplingParams = GREEDY,
) -> GenerationRequest:
    """A request with defaults."""
    return GenerationRequest(
        id=name, prompt_token_ids=list(prompt), max_tokens=max_tokens, sampling=sampling
    )


def run(backend: Backend, *requests: GenerationRequest) -> dict[str, list[TokenEvent]]:
    """Run requests together to their ends; each one's events in order."""
    events: dict[str, list[TokenEvent]] = {r.id: [] for r in requests}
    for r in requests:
        backend.add(r)
    steps = 0
    while backend.has_work():
        for event in backend.step():
            events[event.request_id].append(event)
        steps += 1
        assert steps < 10_000, "a backend must come to an end"
    return events


def tokens(events: Sequence[TokenEvent]) -> list[int]:
    """All tokens of one request."""
    return [token for event in events for token in event.token_ids]


def test_a_request_ends_with_exactly_one_terminal_event(backend: Backend) -> None:
    """The last event, and no other, has a finish reason."""
    for events in run(backend, *(request(f"r{i}", max_tokens=1 + i) for i in range(5))).values():
        assert [e.finish_reason is not None for e in events] == [False] * (len(events) - 1) + [True]


def test_the_token_limit_is_exact(backend: Backend) -> None:
    """An answer that does not end by itself has as many tokens as were asked for."""
    for limit in (1, 2, 5):
        (events,) = run(backend, request("r", max_tokens=limit)).values()
        assert len(tokens(events)) <= limit
        if events[-1].finish_reason == "length":
            assert len(tokens(events)) == limit


def test_greedy_is_deterministic(backend: Backend) -> None:
    """The same prompt at temperature 0 gives the same tokens."""
    first, second = (tokens(run(backend, request("r"))["r"]) for _ in range(2))
    assert first == second


def test_a_request_does_not_feel_its_batch(backend: Backend) -> None:
    """Greedy tokens are the same alone and among 31 others, in float32."""
    prompts = {f"r{i}": [10 + i, 20 + i, *range(30, 30 + i)] for i in range(MAX_RUNNING)}
    alone = {name: tokens(run(backend, request(name, p))[name]) for name, p in prompts.items()}
    together = run(backend, *(request(name, p) for name, p in prompts.items()))
    assert {name: tokens(events) for name, events in together.items()} == alone


def test_requests_join_a_running_batch(backend: Backend) -> None:
    """A request that comes later gets tokens before an earlier one has ended."""
    backend.add(request("early", prompt=range(10, 60), max_tokens=40))
    for _ in range(3):
        backend.step()
    backend.add(request("late", max_tokens=2))
    order: list[str] = []
    while backend.has_work():
        order += [e.request_id for e in backend.step() if e.finish_reason]
    assert order == ["late", "early"]


def test_a_cancelled_request_is_silent_and_its_neighbours_go_on(backend: Backend) -> None:
    """After a cancellation no event of that request comes, and others lose nothing."""
    expected = tokens(run(backend, request("stays"))["stays"])
    backend.add(request("stays"))
    backend.add(request("leaves", prompt=range(10, 60), max_tokens=40))
    events = backend.step()
    backend.cancel("leaves")
    while backend.has_work():
        step = backend.step()
        assert all(e.request_id != "leaves" for e in step)
        events += step
    assert tokens([e for e in events if e.request_id == "stays"]) == expected


def test_a_request_can_be_cancelled_before_its_first_step(backend: Backend) -> None:
    """Cancelling what was only just added leaves no work."""
    backend.add(request("r"))
    backend.cancel("r")
    assert backend.step() == []


def test_cancelling_the_unknown_is_harmless(backend: Backend) -> None:
    """An id that was never added, or has ended, is ignored."""
    run(backend, request("r"))
    backend.cancel("r")
    backend.cancel("never")
    assert len(run(backend, request("r"))["r"]) > 0


def test_a_cancelled_requests_room_is_given_back(backend: Backend) -> None:
    """Cancelling over and over does not use up the cache."""
    for i in range(3 * MAX_RUNNING):
        backend.add(request(f"r{i}", prompt=range(10, 200), max_tokens=200))
        backend.step()
        backend.cancel(f"r{i}")
    assert tokens(run(backend, request("last"))["last"])


def test_one_token_prompt(backend: Backend) -> None:
    """The shortest prompt works."""
    assert len(run(backend, request("r", prompt=[42]))["r"]) >= 1


def test_prompt_and_answer_may_fill_the_context(backend: Backend) -> None:
    """A request that uses the last token of the context ends normally."""
    limit = 4
    prompt = [10 + i % 200 for i in range(backend.info.context_length - limit)]
    events = run(backend, request("r", prompt=prompt, max_tokens=limit))["r"]
    assert events[-1].finish_reason in {"stop", "length"}
    assert 1 <= len(tokens(events)) <= limit


def test_a_seed_repeats_whatever_else_is_in_the_batch(backend: Backend) -> None:
    """A seeded sampled answer is the same alone and beside others, and another seed differs."""
    sampled = SamplingParams(temperature=1.5, seed=7)
    alone = tokens(run(backend, request("r", sampling=sampled, max_tokens=16))["r"])
    beside = run(
        backend,
        request("r", sampling=sampled, max_tokens=16),
        *(
            request(f"o{i}", [20 + i], 16, SamplingParams(temperature=1.0, seed=i))
            for i in range(5)
        ),
    )
    assert tokens(beside["r"]) == alone
    if backend.info.backend != "echo":
        other = SamplingParams(temperature=1.5, seed=8)
        assert tokens(run(backend, request("r", sampling=other, max_tokens=16))["r"]) != alone


def test_top_k_one_is_greedy(backend: Backend) -> None:
    """Only the likeliest token is left, however hot the sampling."""
    hot = SamplingParams(temperature=2, top_k=1, seed=1)
    greedy = tokens(run(backend, request("r"))["r"])
    assert tokens(run(backend, request("r", sampling=hot))["r"]) == greedy


def test_the_context_and_the_tokenizer_are_told(backend: Backend) -> None:
    """The API process gets what it needs to render, encode and check."""
    info = backend.info
    assert info.context_length > 0
    assert info.chat_template is not None
    assert info.tokenizer_json.startswith("{")
    assert {"temperature", "top_p", "top_k", "seed"} <= info.supported


def test_a_repeated_prompt_finds_its_prefix(tiny_model_dir: Path) -> None:
    """The second request with a long common prefix reports tokens from the KV cache."""
    backend = _transformers(tiny_model_dir)
    prompt = [10 + i % 200 for i in range(200)]
    first = run(backend, request("a", prompt))["a"]
    second = run(backend, request("b", prompt))["b"]
    assert first[0].cached_tokens == 0
    assert second[0].cached_tokens >= 160
    assert tokens(first) == tokens(second)


def test_a_penalty_changes_only_its_own_row(tiny_model_dir: Path) -> None:
    """A penalised request says other things; its greedy neighbour says the same."""
    backend = _transformers(tiny_model_dir)
    plain = tokens(run(backend, request("p", max_tokens=24))["p"])
    penalised = SamplingParams(temperature=0, frequency_penalty=2.0, presence_penalty=2.0)
    both = run(
        backend,
        request("p", max_tokens=24),
        request("q", max_tokens=24, sampling=penalised),
    )
    assert tokens(both["p"]) == plain
    repeats = len(plain) - len(set(plain))
    assert len(both["q"]) - len(set(tokens(both["q"]))) < repeats or repeats == 0
