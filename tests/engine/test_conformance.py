"""What every backend must do; a new backend is a row in tests/support/backends.py.

test_conformance_text.py has the same for the engine process: text, deadlines and faults. Of the
answers that outgrow the cache, `make test-full` has more and longer ones.
"""

import os
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path

import pytest

from app.llm.protocol import Backend, SamplingParams, TokenEvent
from tests.support.backends import (
    MAX_RUNNING,
    PROMPT,
    load,
    logprobs,
    reference,
    request,
    rows,
    run,
    settings_of,
    tokens,
)

Loader = Callable[[str], Backend]

# Requests, and tokens of a prompt and of an answer. A cache of one context has room for the prompts
# of three, and not for their answers.
_OUTGROWING = (8, 120, 60) if "FULL_SIZE" in os.environ else (5, 160, 30)


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> Loader:
    """Loads each backend once for all tests."""
    return cache(lambda name: load(settings_of(name, tiny_model_dir)))


@pytest.fixture(scope="module")
def references(tiny_model_dir: Path) -> Loader:
    """Loads what backends are compared with once for all tests."""
    models: dict[str, Backend] = {}

    def compared_with(name: str) -> Backend:
        settings = reference(name, tiny_model_dir)
        if settings.name not in models:
            models[settings.name] = load(settings)
        return models[settings.name]

    return compared_with


def _leaves_nothing(backend: Backend) -> Iterator[Backend]:
    """After each test no request and no work is left."""
    yield backend
    for _ in range(3):
        if backend.has_work():
            backend.step()
    assert not backend.has_work()
    assert backend.stats().running == 0


@pytest.fixture(params=rows(with_plain=True))
def backend(request: pytest.FixtureRequest, loaded: Loader) -> Iterator[Backend]:
    """Each backend in turn."""
    yield from _leaves_nothing(loaded(request.param))


@pytest.fixture(params=rows(with_echo=False, with_plain=True))
def model(request: pytest.FixtureRequest, loaded: Loader) -> Iterator[Backend]:
    """Each backend that runs a model."""
    yield from _leaves_nothing(loaded(request.param))


def test_a_request_ends_with_exactly_one_terminal_event(backend: Backend) -> None:
    """Only the last event has a finish reason."""
    for events in run(backend, *(request(f"r{i}", max_tokens=1 + i) for i in range(5))).values():
        assert [e.finish_reason is not None for e in events] == [False] * (len(events) - 1) + [True]


def test_the_token_limit_is_exact(backend: Backend) -> None:
    """An answer that does not end by itself has exactly the requested number of tokens."""
    for limit in (1, 2, 5):
        (events,) = run(backend, request("r", max_tokens=limit)).values()
        assert len(tokens(events)) <= limit
        if events[-1].finish_reason == "length":
            assert len(tokens(events)) == limit


def test_an_answer_does_not_end_before_min_tokens(backend: Backend) -> None:
    """A request ends with ``length`` if it must have as many tokens as it may; others are free."""
    wanting = SamplingParams(min_tokens=1_000_000, temperature=2, seed=3)
    asked = [request(f"r{i}", max_tokens=60, sampling=wanting) for i in range(4)]
    free = [request(f"free{i}", max_tokens=60) for i in range(2)]
    found = run(backend, *asked, *free)
    assert {len(tokens(found[r.id])) for r in asked} == {60}
    assert {found[r.id][-1].finish_reason for r in asked} == {"length"}
    alone = run(backend, *free)
    assert {name: tokens(e) for name, e in alone.items()} == {
        r.id: tokens(found[r.id]) for r in free
    }


def test_greedy_is_deterministic(backend: Backend) -> None:
    """The same prompt at temperature 0 gives the same tokens."""
    first, second = (tokens(run(backend, request("r"))["r"]) for _ in range(2))
    assert first == second


def test_the_batch_does_not_change_an_answer(backend: Backend) -> None:
    """In float32 greedy tokens are the same alone and in a batch of 32."""
    prompts = {f"r{i}": [10 + i, 20 + i, *range(30, 30 + i)] for i in range(MAX_RUNNING)}
    asked = {name: request(name, p, max_tokens=4) for name, p in prompts.items()}
    alone = {name: tokens(run(backend, one)[name]) for name, one in asked.items()}
    together = run(backend, *asked.values())
    assert {name: tokens(events) for name, events in together.items()} == alone


def test_requests_join_a_running_batch(backend: Backend) -> None:
    """A request that is added later gets tokens before an earlier one has ended."""
    backend.add(request("early", prompt=range(10, 60), max_tokens=40))
    for _ in range(3):
        backend.step()
    backend.add(request("late", max_tokens=2))
    order: list[str] = []
    while backend.has_work():
        order += [e.request_id for e in backend.step() if e.finish_reason]
    assert order == ["late", "early"]


def test_a_cancelled_request_has_no_more_events(backend: Backend) -> None:
    """After a cancellation the request has no event, and another request's answer is complete."""
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
    """Cancelling a request before its first step leaves no work."""
    backend.add(request("r"))
    backend.cancel("r")
    assert backend.step() == []


def test_an_unknown_id_can_be_cancelled(backend: Backend) -> None:
    """Cancelling an id that was never added, or whose request has ended, does nothing."""
    run(backend, request("r"))
    backend.cancel("r")
    backend.cancel("never")
    assert len(run(backend, request("r"))["r"]) > 0


def test_a_cancelled_requests_cache_is_freed(backend: Backend) -> None:
    """Many cancelled requests do not fill the cache."""
    for i in range(3 * MAX_RUNNING):
        backend.add(request(f"r{i}", prompt=range(10, 200), max_tokens=200))
        backend.step()
        backend.cancel(f"r{i}")
    assert tokens(run(backend, request("last"))["last"])


def test_one_token_prompt(backend: Backend) -> None:
    """A prompt of one token gets an answer."""
    assert len(run(backend, request("r", prompt=[42]))["r"]) >= 1


def test_prompt_and_answer_may_fill_the_context(backend: Backend) -> None:
    """A request that fills the context ends normally."""
    limit = 4
    prompt = [10 + i % 200 for i in range(backend.info.context_length - limit)]
    events = run(backend, request("r", prompt=prompt, max_tokens=limit))["r"]
    assert events[-1].finish_reason in {"stop", "length"}
    assert 1 <= len(tokens(events)) <= limit


def test_a_seed_repeats_an_answer_in_any_batch(backend: Backend) -> None:
    """A seeded answer is the same alone and in a batch, and differs with another seed."""
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
    """With top_k 1 the likeliest token is chosen at any temperature."""
    hot = SamplingParams(temperature=2, top_k=1, seed=1)
    greedy = tokens(run(backend, request("r"))["r"])
    assert tokens(run(backend, request("r", sampling=hot))["r"]) == greedy


def test_the_info_has_the_context_and_the_tokenizer(backend: Backend) -> None:
    """The API process gets what it needs to render, encode and check a prompt."""
    info = backend.info
    assert info.context_length > 0
    assert info.chat_template is not None
    assert info.tokenizer_json.startswith("{")
    assert {"temperature", "top_p", "top_k", "seed"} <= info.supported


def test_a_repeated_prompt_hits_the_cache(model: Backend) -> None:
    """The second request with the same long prompt reports cached tokens."""
    prompt = [50 + i * 7 % 180 for i in range(200)]
    first = run(model, request("a", prompt))["a"]
    second = run(model, request("b", prompt))["b"]
    assert first[0].cached_tokens == 0
    assert 160 <= second[0].cached_tokens < len(prompt)
    assert tokens(first) == tokens(second)


def test_an_answer_is_cached_for_the_next_prompt(model: Backend) -> None:
    """A follow-up reports the previous answer's tokens as cached, too."""
    prompt = [60 + i * 11 % 150 for i in range(100)]
    answer = tokens(run(model, request("a", prompt, max_tokens=60))["a"])
    if len(answer) < 40:
        pytest.fail("the tiny model is expected to go on for 40 tokens here")
    follow_up = [*prompt, *answer, 99, 98, 97]
    cached = run(model, request("b", follow_up))["b"][0].cached_tokens
    assert cached >= len(prompt) + len(answer) - 64


def test_a_penalty_changes_only_its_own_row(model: Backend) -> None:
    """A penalised request repeats less, and another request's greedy answer does not change."""
    prompt = [20, 20, 20]
    plain = tokens(run(model, request("p", prompt, max_tokens=40))["p"])
    assert len(set(plain)) < len(plain), "the tiny model is expected to repeat itself here"
    penalised = SamplingParams(temperature=0, frequency_penalty=2.0, presence_penalty=2.0)
    both = run(
        model,
        request("p", prompt, max_tokens=40),
        request("q", prompt, max_tokens=40, sampling=penalised),
    )
    assert tokens(both["p"]) == plain
    assert len(set(tokens(both["q"]))) > len(set(plain))


def test_a_repetition_penalty_counts_the_prompt(model: Backend) -> None:
    """A tiny repetition penalty makes the prompt's tokens the likeliest."""
    prompt = [20, 30, 40, 50]
    rewarded = SamplingParams(temperature=0, repetition_penalty=0.01)
    said = tokens(run(model, request("r", prompt, max_tokens=10, sampling=rewarded))["r"])
    assert set(said) <= set(prompt), said


def test_a_large_bias_decides(model: Backend) -> None:
    """A backend that supports it adds it to the logits of that request alone."""
    if "logit_bias" not in model.info.supported:
        pytest.skip(f"{model.info.backend} does not support logit_bias")
    plain = tokens(run(model, request("p"))["p"])
    biased = SamplingParams(temperature=0, logit_bias={77: 100.0})
    both = run(model, request("p"), request("q", sampling=biased))
    assert tokens(both["p"]) == plain
    assert tokens(both["q"]) == [77] * 8


def test_requested_logprobs_are_returned(backend: Backend) -> None:
    """Each token of the request has one, and a request that did not ask for them has none."""
    asked = request("asked", max_tokens=6, logprobs=True)
    events = run(backend, asked, request("other", max_tokens=6))
    values = logprobs(events["asked"])
    assert len(values) == len(tokens(events["asked"]))
    assert all(value <= 0 for value in values)
    assert logprobs(events["other"]) == []


def test_logprobs_are_the_models_own(model: Backend) -> None:
    """Penalties, temperature and filters do not change a token's log-probability."""
    greedy = run(model, request("g", max_tokens=1, logprobs=True))["g"]
    sampling = SamplingParams(temperature=0.1, top_k=1, presence_penalty=1.5, seed=3)
    sampled = run(model, request("s", max_tokens=1, sampling=sampling, logprobs=True))["s"]
    assert tokens(sampled) == tokens(greedy)
    assert logprobs(sampled) == pytest.approx(logprobs(greedy), abs=1e-4)


@pytest.mark.parametrize("prompt", [PROMPT, [200], [40 + i % 190 for i in range(150)]])
def test_backends_agree(model: Backend, references: Loader, prompt: list[int]) -> None:
    """In float32 all backends give the same tokens with the same log-probabilities."""
    asked = request("r", prompt, max_tokens=24, logprobs=True)
    answer, expected = run(model, asked)["r"], run(references(model.info.backend), asked)["r"]
    assert tokens(answer) == tokens(expected)
    assert logprobs(answer) == pytest.approx(logprobs(expected), abs=1e-3)


def test_extreme_parameters_give_an_answer(backend: Backend) -> None:
    """The limits of every range that the API accepts give an answer, not an error."""
    extremes = [
        SamplingParams(temperature=1e-40),
        SamplingParams(temperature=1e-5, seed=0),
        SamplingParams(temperature=2, min_p=1),
        SamplingParams(temperature=2, top_p=1e-9),
        SamplingParams(temperature=2, top_k=10**9, seed=2**63 - 1),
        SamplingParams(temperature=0, repetition_penalty=1e-9),
        SamplingParams(temperature=1, presence_penalty=-2, frequency_penalty=-2, seed=-5),
    ]
    answers = run(backend, *(request(f"r{i}", sampling=s) for i, s in enumerate(extremes)))
    for events in answers.values():
        assert events[-1].finish_reason in {"stop", "length"}
        assert tokens(events)


def test_min_p_one_is_greedy(backend: Backend) -> None:
    """With min_p 1 the likeliest token is chosen at any temperature."""
    hot = SamplingParams(temperature=2, min_p=1, seed=1)
    greedy = tokens(run(backend, request("r"))["r"])
    assert tokens(run(backend, request("r", sampling=hot))["r"]) == greedy


def test_unseeded_answers_differ(model: Backend) -> None:
    """Requests without a seed do not share one."""
    hot = SamplingParams(temperature=2)
    answers = run(model, *(request(f"r{i}", max_tokens=16, sampling=hot) for i in range(4)))
    assert len({tuple(tokens(events)) for events in answers.values()}) == 4


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
def test_cancel_at_every_phase(backend: Backend, steps: int) -> None:
    """A request has no event after it is cancelled waiting, in its prompt or in its answer."""
    long = [10 + i % 200 for i in range(400)]
    backend.add(request("leaves", long, max_tokens=100))
    for _ in range(steps):
        backend.step()
    backend.cancel("leaves")
    assert backend.stats().running == 0
    seen: list[TokenEvent] = []
    while backend.has_work():
        seen += backend.step()
    assert seen == []
    assert tokens(run(backend, request("next"))["next"])


@pytest.mark.parametrize("name", rows(with_echo=False))
def test_requests_that_outgrow_the_cache_take_turns(
    name: str, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long answers are the same together in a cache of one context as alone."""
    monkeypatch.setattr("app.llm.engine.cache_size.TOKENS_PER_REQUEST", 1)
    backend = load(settings_of(name, tiny_model_dir))
    number, length, limit = _OUTGROWING
    asked = {
        f"r{i}": request(f"r{i}", [10 + (i * 31 + j) % 200 for j in range(length)], limit)
        for i in range(number)
    }
    alone = {n: tokens(run(backend, one)[n]) for n, one in asked.items()}
    together: dict[str, list[int]] = {n: [] for n in asked}
    last: dict[str, int] = {}
    interrupted = set()
    for one in asked.values():
        backend.add(one)
    for step in count():
        if not backend.has_work():
            break
        for event in backend.step():
            if last.get(event.request_id, step) < step - 1:
                interrupted.add(event.request_id)
            last[event.request_id] = step
            together[event.request_id] += event.token_ids
    assert together == alone
    if name in {"openvino", "transformers"}:
        # Others size their caches by themselves.
        assert interrupted
