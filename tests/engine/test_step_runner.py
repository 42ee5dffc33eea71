"""CUDA graphs, on graphs that a CPU can run (tests/support/fake_graphs.py), and what runs plainly.

The conformance tests' row ``transformers-cuda`` runs the real ones, where there is a GPU.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from transformers.generation.continuous_batching import model_runner

from app.core.config import ModelSettings
from app.llm.engine import attention_choice, step_runner, transformers_backend
from app.llm.engine.base import GenerationRequest, RegexGrammar, SamplingParams, TokenEvent
from app.llm.engine.transformers_backend import TransformersBackend
from tests.support import fake_graphs
from tests.support.backends import BACKENDS, load, logprobs, request, run, settings_of, tokens

LONG = [10 + i * 7 % 200 for i in range(300)]


def _start(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any] | None = None
) -> TransformersBackend:
    """The tiny model as it would run on a GPU without flash attention, with a small cache."""
    configure = transformers_backend.batching_config

    def small(*args: Any) -> Any:
        config = configure(*args)
        # Prompts of more than 80 tokens come in pieces; 64 tokens are the largest graph.
        config.num_blocks, config.max_batch_tokens = 96, 80
        return config

    with pytest.MonkeyPatch.context() as patch:
        for module in (transformers_backend, attention_choice):
            patch.setattr(module, "runs_on_gpu", lambda _: True)
        patch.setattr(transformers_backend, "batching_config", small)
        backend = load(BACKENDS["transformers"](tiny).model_copy(update=settings or {}))
    assert isinstance(backend, TransformersBackend)
    return backend


def _runner(backend: TransformersBackend) -> step_runner.StepRunner:
    runner = backend._batching.model_runner
    assert isinstance(runner, step_runner.StepRunner)
    return runner


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path) -> TransformersBackend:
    """The tiny model without graphs; what it says is what is right."""
    with pytest.MonkeyPatch.context() as patch:
        backend = _start(tiny_model_dir, patch, {"cuda_graphs": False})
    assert not _runner(backend).uses_graphs
    return backend


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> fake_graphs.FakeGraphs:
    """Graphs on this machine."""
    return fake_graphs.install(monkeypatch)


@pytest.fixture
def replaying(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, graphs: fake_graphs.FakeGraphs
) -> TransformersBackend:
    """The tiny model with graphs that have passed their trial."""
    backend = _start(tiny_model_dir, monkeypatch)
    assert _runner(backend).uses_graphs
    assert not backend.has_work()
    return backend


def _mixed() -> list[GenerationRequest]:
    """Requests that choose in every way, with short and long prompts."""
    ways = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.2, seed=1),
        SamplingParams(temperature=0.9, top_p=0.9, top_k=20, min_p=0.01, seed=2),
        SamplingParams(temperature=0, presence_penalty=1.0, frequency_penalty=1.0),
        SamplingParams(temperature=1.5, seed=3, repetition_penalty=1.3, logit_bias={77: 5.0}),
    ]
    plain = [
        request(f"r{i}", LONG[i : i + 1 + i * 53 % 211], 5 + i * 3, way, logprobs=i % 2 == 1)
        for i, way in enumerate(ways * 2)
    ]
    letters = RegexGrammar("[a-z]{3,9}")
    return [*plain[:5], replace(plain[5], id="g", grammar=letters, top_logprobs=3), *plain[6:]]


def _join_and_leave(backend: TransformersBackend) -> dict[str, list[TokenEvent]]:
    """Add a request every second step, and cancel one of four after some steps."""
    events: dict[str, list[TokenEvent]] = {}
    coming = _mixed()
    step = 0
    while coming or backend.has_work():
        if step % 2 == 0 and coming:
            one = coming.pop(0)
            events[one.id] = []
            backend.add(one)
        if step % 8 == 7:
            backend.cancel(f"r{step // 2 - 2}")
        for event in backend.step():
            events[event.request_id].append(event)
        step += 1
    return events


def _likeliest(events: list[TokenEvent]) -> list[list[int]]:
    return [[token for token, _ in place] for event in events for place in event.top_logprobs]


def _same(found: dict[str, list[TokenEvent]], expected: dict[str, list[TokenEvent]]) -> None:
    assert {name: tokens(events) for name, events in found.items()} == {
        name: tokens(events) for name, events in expected.items()
    }
    for name, events in expected.items():
        assert _likeliest(found[name]) == _likeliest(events)
        assert logprobs(found[name]) == pytest.approx(logprobs(events), abs=1e-4)
        assert [e.finish_reason for e in found[name]] == [e.finish_reason for e in events]


def test_graphs_say_what_plain_steps_say(
    plain: TransformersBackend,
    replaying: TransformersBackend,
    graphs: fake_graphs.FakeGraphs,
) -> None:
    """Requests that join and leave, long prompts: the same tokens, nearly every step replayed."""
    before, captured = graphs.replays, len(graphs.captures)
    _same(_join_and_leave(replaying), _join_and_leave(plain))
    assert graphs.replays - before > 25
    assert len(graphs.captures) - captured < 10
    # The same again finds its prompts in the cache, and every size captured.
    before, captured = graphs.replays, len(graphs.captures)
    together = run(replaying, *_mixed())
    _same(together, run(plain, *_mixed()))
    assert any(events[0].cached_tokens for events in together.values())
    assert graphs.replays - before > 15


def test_sizes_past_the_most_graphs_run_plainly(
    tiny_model_dir: Path,
    plain: TransformersBackend,
    monkeypatch: pytest.MonkeyPatch,
    graphs: fake_graphs.FakeGraphs,
) -> None:
    """Once there are so many graphs, other sizes are padded and computed."""
    monkeypatch.setattr(step_runner, "_MOST_GRAPHS", 2)
    backend = _start(tiny_model_dir, monkeypatch)
    _same(run(backend, *_mixed()), run(plain, *_mixed()))
    assert len(graphs.captures) == 2
    assert _runner(backend).uses_graphs


@contextmanager
def _one_warning(caplog: pytest.LogCaptureFixture, text: str) -> Iterator[None]:
    """Exactly one warning comes while this is open, and says this."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="llm_service"):
        yield
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("llm_service")]
    assert message.startswith("CUDA graphs are off, decoding is slower: ")
    assert text in message


@pytest.mark.parametrize("fault", ["capture", "stale", "padding"])
def test_graphs_that_do_not_work_are_given_up_at_the_start(
    fault: str,
    tiny_model_dir: Path,
    plain: TransformersBackend,
    monkeypatch: pytest.MonkeyPatch,
    graphs: fake_graphs.FakeGraphs,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A capture that fails, replays that do nothing, a padded pass that fails: one warning."""
    if fault == "capture":
        graphs.fault = RuntimeError("operation not permitted when stream is capturing")
        text = "operation not permitted"
    elif fault == "stale":
        monkeypatch.setattr(fake_graphs.FakeGraph, "replay", lambda _: None)
        text = "their answers differ"
    else:
        missing = RuntimeError("no such kernel")
        monkeypatch.setattr(model_runner, "memory_pool_context", _raiser(missing))
        text = "no such kernel"
    with _one_warning(caplog, text):
        backend = _start(tiny_model_dir, monkeypatch)
    assert not _runner(backend).uses_graphs
    assert not backend.has_work()
    assert backend.stats().running == 0
    _same(run(backend, *_mixed()), run(plain, *_mixed()))


def _raiser(error: Exception) -> Any:
    def raising(*_: Any) -> Any:
        raise error

    return raising


def test_a_capture_that_fails_later_costs_no_request(
    plain: TransformersBackend,
    replaying: TransformersBackend,
    graphs: fake_graphs.FakeGraphs,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The first step of a new size brings its tokens though it cannot be captured."""
    graphs.fault = MemoryError("out of memory")
    # More tokens in the cache than the trial's smallest size holds.
    requests = [request(f"r{i}", LONG[i : i + 280], 40, logprobs=True) for i in range(6)]
    with _one_warning(caplog, "out of memory"):
        found = run(replaying, *requests)
    _same(found, run(plain, *requests))
    assert not _runner(replaying).uses_graphs


def test_attention_that_is_planned_is_not_captured(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, graphs: fake_graphs.FakeGraphs
) -> None:
    """A model that fused attention cannot run gets ours on a GPU, which graphs would not repeat."""
    monkeypatch.setattr(
        transformers_backend,
        "prefer_flash_attention",
        lambda model: model.set_attn_implementation("eager"),
    )
    backend = _start(tiny_model_dir, monkeypatch)
    assert not _runner(backend).uses_graphs
    assert graphs.captures == []
    assert tokens(run(backend, request("r"))["r"])


@pytest.mark.parametrize(
    ("found", "same"),
    [
        ([(5, -1.0), (6, -1.2)], True),
        ([(5, -1.1), (9, -1.1)], True),
        ([(5, -1.0), (6, -2.0)], False),
        ([(5, -1.0), (9, -1.9)], False),
        ([(5, float("nan")), (6, -1.2)], False),
        ([(5, -1.0)], False),
    ],
)
def test_only_a_tie_may_go_another_way(found: list[tuple[int, float]], same: bool) -> None:
    """Another token is accepted where it is as likely, and never another likelihood."""
    assert step_runner._agree([(5, -1.0), (6, -1.2)], found) is same


@pytest.mark.gpu
def test_a_gpu_replays(tiny_model_dir: Path) -> None:
    """On a GPU the conformance tests' model passes the trial and is replayed."""
    settings: ModelSettings = settings_of("transformers-cuda", tiny_model_dir)
    backend = load(settings)
    assert isinstance(backend, TransformersBackend)
    runner = _runner(backend)
    assert runner.uses_graphs
    assert runner._graphs
