"""Parsing of responses, and the figures of a round."""

import json

import pytest

from benchmarks.load.results import (
    LatencyTarget,
    Outcome,
    Result,
    median_figures,
    percentile,
    result_of,
    summarise,
)
from benchmarks.load.targets import Route, Target, read_stream
from benchmarks.load.transport import Exchange
from benchmarks.load.workload import PlannedRequest


def exchange(*pieces: tuple[float, str], status: int = 200, failure: str | None = None) -> Exchange:
    """A response of these pieces to a request sent at 10.0."""
    end = max((at for at, _ in pieces), default=10.5)
    body = [(at, text.encode()) for at, text in pieces]
    return Exchange(10.0, 10.0, status, {}, body, end, failure)


def data(**event: object) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(event)}\n\n"


NATIVE = (
    (10.1, data(delta={"role": "assistant"})),
    (10.3, data(delta={"content": "One"}) + data(delta={"content": " two"})),
    (10.4, data(delta={"content": " three"})),
    (10.5, data(delta={}, finish_reason="stop", tokens_generated=4, usage={"prompt_tokens": 9})),
    (10.5, "data: [DONE]\n\n"),
)
OPENAI = (
    (10.1, data(choices=[{"delta": {"role": "assistant", "content": None}}])),
    (10.3, data(choices=[{"delta": {"content": "One"}}])),
    (10.4, data(choices=[{"delta": {"content": " two"}}])),
    (10.5, data(choices=[{"delta": {}, "finish_reason": "length"}])),
    (10.6, data(choices=[], usage={"completion_tokens": 2, "prompt_tokens": 5})),
)
NO_EVENT = "an event is not the JSON object that it should be"
COMPLETIONS = ((10.3, data(choices=[{"text": "One", "finish_reason": "stop"}])),)


def test_a_native_stream_is_read() -> None:
    """TTFT is that of the first text, not of the role; tokens are the service's count."""
    result = result_of(exchange(*NATIVE))
    assert result.outcome is Outcome.COMPLETED
    assert result.text == "One two three"
    assert result.ttft == pytest.approx(0.3)
    assert result.gaps == pytest.approx((0.0, 0.1))
    assert (result.tokens, result.tokens_reported, result.prompt_tokens) == (4, True, 9)
    assert result.time_per_token == pytest.approx(0.1 / 3)


def test_streams_of_openai_s_routes_are_read() -> None:
    """Both of OpenAI's shapes are read; tokens are from usage, else the number of pieces."""
    chat, completion = result_of(exchange(*OPENAI)), result_of(exchange(*COMPLETIONS))
    assert (chat.outcome, chat.text, chat.tokens) == (Outcome.COMPLETED, "One two", 2)
    assert (completion.text, completion.tokens) == ("One", 1)
    assert (chat.tokens_reported, completion.tokens_reported) == (True, False)
    assert summarise([chat])["tokens_from"] == "usage"
    assert summarise([chat, completion])["tokens_from"] == "chunks"


def test_any_division_of_a_stream_reads_the_same() -> None:
    """Events are read correctly wherever they are cut, also inside a character."""
    whole = "".join(text for _, text in NATIVE).replace("two", "\u6771\u4eac").encode()
    for size in (1, 2, 7, len(whole)):
        pieces = [(1.0, whole[i : i + size]) for i in range(0, len(whole), size)]
        assert read_stream(pieces).text == "One \u6771\u4eac three"


@pytest.mark.parametrize(
    ("found", "outcome", "error"),
    [
        (
            exchange((10.2, '{"error": {"code": "overloaded"}}'), status=503),
            "refused",
            "overloaded",
        ),
        (exchange((10.2, "slow down"), status=429), "refused", "status 429"),
        (exchange((10.2, '{"detail": "no"}'), status=404), "failed", "status 404"),
        (exchange(*NATIVE[:3]), "failed", "the stream ended without a last event"),
        (exchange(*NATIVE[:3], (10.5, data(error={"code": "boom"}))), "failed", "boom"),
        (exchange(*NATIVE, failure="the connection was lost"), "failed", "the connection was lost"),
        (exchange((10.1, "data: not JSON\n\n")), "failed", NO_EVENT),
        (exchange((10.1, 'data: {"choices": [null]}\n\n')), "failed", NO_EVENT),
        (exchange((10.1, 'data: {"usage": 1}\n\n')), "failed", NO_EVENT),
    ],
)
def test_an_incomplete_stream_has_failed(found: Exchange, outcome: str, error: str) -> None:
    """429 and 503 are rejections; any other incomplete stream has failed, with a reason."""
    result = result_of(found)
    assert result.outcome == outcome
    assert (result.error or "").startswith(error)


def completed(sent_at: float, seconds: float, ttft: float, tokens: int = 10) -> Result:
    """A completed request."""
    return Result(Outcome.COMPLETED, sent_at, seconds, ttft=ttft, tokens=tokens)


def test_a_round_is_summed_up() -> None:
    """Rates are over the time from the first sending to the last end, and all requests count."""
    results = [
        completed(0.0, 2.0, 0.5),
        completed(1.0, 4.0, 1.5),
        Result(Outcome.REFUSED, 2.0, 0.01, error="overloaded"),
        Result(Outcome.FAILED, 2.0, 1.0, error="the connection was lost", tokens=3),
    ]
    found = summarise(results, LatencyTarget(ttft=1.0))
    assert found["seconds"] == pytest.approx(5.0)
    assert [found[name] for name in ("sent", "completed", "refused", "failed")] == [4, 2, 1, 1]
    assert found["tokens_per_second"] == pytest.approx(20 / 5)
    assert found["goodput"] == pytest.approx(1 / 5)
    assert found["good_share"] == pytest.approx(1 / 4)
    assert found["errors"] == {"overloaded": 1, "the connection was lost": 1}
    assert found["ttft"]["p50"] == pytest.approx(1.0)
    assert found["refusal"]["p99"] == pytest.approx(0.01)


def test_goodput_needs_every_bound() -> None:
    """A request is good only when it was completed within both bounds."""
    bounds = LatencyTarget(ttft=1.0, seconds=3.0)
    assert bounds.holds(completed(0, 3.0, 1.0))
    assert not bounds.holds(completed(0, 3.1, 1.0))
    assert not bounds.holds(completed(0, 3.0, 1.1))
    assert not bounds.holds(Result(Outcome.REFUSED, 0, 0.0))


def test_percentiles_interpolate() -> None:
    """Percentiles are interpolated linearly, and are None without values."""
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == pytest.approx(2.5)
    assert percentile([1.0, 2.0], 90) == pytest.approx(1.9)
    assert percentile([7.0], 99) == 7.0
    assert percentile([], 50) is None


def test_medians_are_taken_figure_by_figure() -> None:
    """Each figure has its own median over rounds, and errors are added up."""
    rounds = [
        summarise([completed(0, s, 0.1), Result(Outcome.FAILED, 0, 0, error="x")])
        for s in (1.0, 2.0, 10.0)
    ]
    medians = median_figures(rounds)
    assert medians["seconds"] == pytest.approx(2.0)
    assert medians["latency"]["p50"] == pytest.approx(2.0)
    assert medians["refusal"]["p50"] is None
    assert medians["errors"] == {"x": 3}


def test_every_route_is_asked_for_a_stream_that_no_cache_answers() -> None:
    """Native routes get `cache: false` and X-API-Key, others a model, usage and a bearer token."""
    request = PlannedRequest("Hello", 5)
    for route in Route:
        target = Target("http://h", route, key="k", system="Be brief.")
        body = json.loads(target.body(request))
        assert (body["stream"], body["max_tokens"], body["temperature"]) == (True, 5, 0.0)
        assert ("messages" in body) == route.endswith("chat")
        if route.is_native:
            assert body["cache"] is False
            assert target.headers == {"X-API-Key": "k"}
        else:
            assert body["stream_options"] == {"include_usage": True}
            assert target.headers == {"Authorization": "Bearer k"}
