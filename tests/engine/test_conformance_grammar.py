"""Grammars and likeliest tokens: what every backend that supports them must do."""

import json
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer

from app.llm.protocol import (
    Backend,
    GenerationRequest,
    Grammar,
    JsonSchemaGrammar,
    Notation,
    RegexGrammar,
    SamplingParams,
    SharedFrame,
    Tag,
    TagsGrammar,
    TokenEvent,
)
from tests.support.backends import load, logprobs, request, rows, run, settings_of, tokens

OBJECT = {
    "type": "object",
    "properties": {
        "größe": {"type": "integer", "minimum": -9, "maximum": 120},
        "kind": {"enum": ["x", "y", None, 'a "b"']},
        "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["größe", "kind", "parts"],
    "additionalProperties": False,
}
HOT = SamplingParams(temperature=2, seed=11)
END = 2  # The tiny model's end of sequence.


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> Callable[[str], Backend]:
    """Loads each backend once for all tests."""
    return cache(lambda name: load(settings_of(name, tiny_model_dir)))


@pytest.fixture(params=rows(with_echo=False))
def backend(request: pytest.FixtureRequest, loaded: Callable[[str], Backend]) -> Iterator[Backend]:
    """Each backend that supports grammars; after each test no work is left."""
    backend = loaded(request.param)
    if "grammar" not in backend.info.supported:
        pytest.skip(f"{backend.info.backend} does not support grammars")
    yield backend
    for _ in range(3):
        if backend.has_work():
            backend.step()
    assert not backend.has_work()


def with_grammar(
    name: str, grammar: Grammar, max_tokens: int = 100, **given: Any
) -> GenerationRequest:
    """A request for an answer of a grammar."""
    return msgspec.structs.replace(request(name, max_tokens=max_tokens, **given), grammar=grammar)


def of_schema(schema: Any) -> JsonSchemaGrammar:
    """The grammar of a schema."""
    return JsonSchemaGrammar(schema=json.dumps(schema))


def text(backend: Backend, events: list[TokenEvent]) -> str:
    """The text of a request's answer."""
    said: str = Tokenizer.from_str(backend.info.tokenizer_json).decode(tokens(events))
    return said


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0), HOT])
def test_an_answer_is_of_its_schema(backend: Backend, sampling: SamplingParams) -> None:
    """It is complete JSON on one line, and its last token is the end-of-sequence token."""
    events = run(backend, with_grammar("r", of_schema(OBJECT), sampling=sampling))["r"]
    said = text(backend, events)
    value = json.loads(said)
    assert list(value) == ["größe", "kind", "parts"]
    assert -9 <= value["größe"] <= 120
    assert value["kind"] in OBJECT["properties"]["kind"]["enum"]  # type: ignore[index]
    assert 1 <= len(value["parts"]) <= 2
    assert re.search(r"[\n\t]|  ", said) is None
    assert events[-1].finish_reason == "stop"
    assert tokens(events)[-1] == END


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0), HOT])
def test_an_answer_matches_its_regular_expression(
    backend: Backend, sampling: SamplingParams
) -> None:
    """The whole answer matches."""
    pattern = r"(19|20)\d{2}-[a-f]{3,5}(ß|日本)?x"
    events = run(backend, with_grammar("r", RegexGrammar(pattern), sampling=sampling))["r"]
    assert re.fullmatch(pattern, text(backend, events))
    assert events[-1].finish_reason == "stop"


@pytest.mark.parametrize("pattern", ["[^a\ufffd]{20}", "[\u0101-\u2345\u3001-\ufff0]{20}"])
def test_an_answer_is_of_whole_characters(backend: Backend, pattern: str) -> None:
    """Where any character may come, no bytes come that are none in UTF-8."""
    asked = [
        with_grammar(
            f"r{seed}", RegexGrammar(pattern), sampling=SamplingParams(temperature=2, seed=seed)
        )
        for seed in range(8)
    ]
    for events in run(backend, *asked).values():
        assert re.fullmatch(pattern, text(backend, events), re.DOTALL)


def tags(*, required: bool = False, single: bool = False) -> TagsGrammar:
    """Two tools, called by ``<f:…>`` and an argument."""
    calls = [
        Tag(begin="<f:one>", schema='{"enum": [1, 2]}', end="</f>"),
        Tag(begin="<f:two>", schema='{"type": "boolean"}', end="</f>"),
    ]
    return TagsGrammar(tags=calls, trigger="<f:", required=required, single=single)


_CALL = r"(<f:one>[12]</f>|<f:two>(true|false)</f>)"


def test_required_tags_have_no_text_beside_them(backend: Backend) -> None:
    """An answer is one tagged part, or several in succession where that is allowed."""
    single = run(backend, with_grammar("r", tags(required=True, single=True), sampling=HOT))["r"]
    assert re.fullmatch(_CALL, text(backend, single))
    assert single[-1].finish_reason == "stop"
    several = run(backend, with_grammar("r", tags(required=True), 60, sampling=HOT))["r"]
    said = text(backend, several)
    assert re.match(_CALL, said)
    assert re.fullmatch(rf"(\n?{_CALL})+(\n?<[^<]*(</?f?)?)?", said)


@pytest.mark.parametrize("otherwise", [of_schema({"enum": [7, "é"]}), RegexGrammar("x/[yz]{2}")])
def test_tags_or_another_form(backend: Backend, otherwise: Grammar) -> None:
    """An answer is tagged parts, or of the other form as a whole; both occur."""
    grammar = msgspec.structs.replace(tags(required=True, single=True), otherwise=otherwise)
    requests = [
        with_grammar(f"r{i}", grammar, 60, sampling=SamplingParams(temperature=2, seed=i))
        for i in range(16)
    ]
    answers = run(backend, *requests)
    texts = {text(backend, events) for events in answers.values()}
    calls = {said for said in texts if re.fullmatch(_CALL, said)}
    assert all(re.fullmatch('7|"é"|x/[yz]{2}', said) for said in texts - calls), texts
    assert calls
    assert texts - calls
    assert {events[-1].finish_reason for events in answers.values()} == {"stop"}


@pytest.mark.parametrize(
    ("notation", "pattern"),
    [
        ("xml", r"<parameter=a>\n[12]\n</parameter>\n(<parameter=b>\n[xy]\n</parameter>\n)?"),
        ("gemma", r'\{a:[12](,b:<\|"\|>[xy]<\|"\|>)?\}'),
    ],
)
def test_arguments_have_a_notation(backend: Backend, notation: Notation, pattern: str) -> None:
    """Arguments that are not written as JSON follow their schema too."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {"type": "string", "pattern": "^[xy]$"}},
        "required": ["a"],
    }
    tag = Tag("<f>", json.dumps(schema), "</f>", notation=notation)
    grammar = TagsGrammar([tag], "<f", required=True, single=True)
    events = run(backend, with_grammar("r", grammar, sampling=HOT))["r"]
    assert re.fullmatch(f"<f>{pattern}</f>", text(backend, events))
    assert events[-1].finish_reason == "stop"


def test_text_may_have_a_header(backend: Backend) -> None:
    """An answer begins with a tagged part, or with the header of its text; both occur."""
    tag = Tag(begin="<\uff5ca>b", schema='{"enum": [1, 2]}', end="c")
    grammar = TagsGrammar(tags=[tag], trigger="<\uff5ca>", single=True, text_begin="T:")
    requests = [
        with_grammar(f"r{i}", grammar, 30, sampling=SamplingParams(temperature=2, seed=i))
        for i in range(8)
    ]
    texts = [text(backend, events) for events in run(backend, *requests).values()]
    calls = [said for said in texts if said.startswith("<")]
    assert 0 < len(calls) < len(texts)
    assert all(re.fullmatch("<\uff5ca>b[12]c", said) for said in calls), calls
    assert all(said.startswith("T:") for said in texts if said not in calls), texts


@pytest.mark.parametrize("single", [False, True])
def test_tags_may_come_in_text(backend: Backend, single: bool) -> None:
    """The trigger always begins one of the tags, and other text is free."""
    tag = Tag(begin="ab", schema='{"enum": [1, 2]}', end="c")
    grammar = TagsGrammar(tags=[tag], trigger="a", single=single)
    requests = [
        with_grammar(f"r{i}", grammar, 120, sampling=SamplingParams(temperature=2, seed=i))
        for i in range(8)
    ]
    answers = run(backend, *requests)
    texts = [text(backend, events) for events in answers.values()]
    assert any("ab" in said for said in texts), "the tiny model is expected to say the trigger"
    calls = "(ab[12]c)?" if single else "(ab[12]c|[^a])*"
    for said in texts:
        assert re.fullmatch(rf"(?s)[^a]*{calls}(a|ab|ab[12])?", said), said


@pytest.mark.parametrize("required", [False, True])
def test_tags_may_share_a_frame(backend: Backend, required: bool) -> None:
    """Tagged parts in one frame are a list, behind which the answer ends."""
    grammar = TagsGrammar(
        tags=[Tag(begin="b", schema='{"enum": [1, 2]}', end="c")],
        trigger="a",
        required=required,
        shared=SharedFrame("a[", ", ", "]"),
    )
    requests = [
        with_grammar(f"r{i}", grammar, 120, sampling=SamplingParams(temperature=2, seed=i))
        for i in range(8)
    ]
    answers = run(backend, *requests)
    said = [text(backend, events) for events in answers.values()]
    ended = [events[-1].finish_reason == "stop" for events in answers.values()]
    before = "" if required else "[^a]*"
    lists = [t for t, is_whole in zip(said, ended, strict=True) if is_whole and "a" in t]
    assert lists, "the tiny model is expected to end a list"
    assert all(re.fullmatch(rf"(?s){before}a\[b[12]c(, b[12]c)*\]", t) for t in lists), lists
    assert all(re.match(rf"(?s){before}(a|$)(\[|$)(b|$)([12]|$)", t) for t in said), said


def test_requests_without_a_grammar_are_not_changed(backend: Backend) -> None:
    """Greedy tokens are the same alone and in a batch with grammars."""
    alone = {f"p{i}": tokens(run(backend, request("p", [20 + i]))["p"]) for i in range(4)}
    together = run(
        backend,
        *(request(f"p{i}", [20 + i]) for i in range(4)),
        *(with_grammar(f"g{i}", of_schema(OBJECT), 20) for i in range(4)),
        with_grammar("regex", RegexGrammar("[ab]{20}")),
    )
    assert {name: tokens(together[name]) for name in alone} == alone
    assert re.fullmatch("[ab]{20}", text(backend, together["regex"]))


def test_the_batch_does_not_change_an_answer_with_a_grammar(backend: Backend) -> None:
    """A seeded answer is the same alone and in a batch with the same grammar."""
    alone = run(backend, with_grammar("r", of_schema(OBJECT), 20, sampling=HOT))["r"]
    together = run(
        backend,
        with_grammar("r", of_schema(OBJECT), 20, sampling=HOT),
        *(with_grammar(f"g{i}", of_schema(OBJECT), 20, prompt=[30 + i]) for i in range(4)),
    )
    assert tokens(together["r"]) == tokens(alone)


def test_the_token_limit_cuts_a_grammar(backend: Backend) -> None:
    """An answer that the limit cuts has the finish reason ``length``."""
    events = run(backend, with_grammar("r", of_schema(OBJECT), max_tokens=5))["r"]
    assert events[-1].finish_reason == "length"
    assert len(tokens(events)) == 5


def test_cancelling_inside_a_grammar(backend: Backend) -> None:
    """Another request with the same grammar goes on."""
    expected = tokens(run(backend, with_grammar("stays", of_schema(OBJECT), 20))["stays"])
    backend.add(with_grammar("stays", of_schema(OBJECT), 20))
    backend.add(with_grammar("leaves", of_schema(OBJECT), 20))
    events = [event for _ in range(4) for event in backend.step()]
    backend.cancel("leaves")
    while backend.has_work():
        step = backend.step()
        assert all(event.request_id != "leaves" for event in step)
        events += step
    assert tokens([e for e in events if e.request_id == "stays"]) == expected


_BAD: list[Grammar] = [
    JsonSchemaGrammar("{"),
    of_schema({"type": "frog"}),
    RegexGrammar("(a"),
    RegexGrammar("(?=a)b"),
    TagsGrammar(tags=[Tag("x", "{", "y")], trigger="x", required=True),
]


def test_a_malformed_grammar_fails_alone(backend: Backend) -> None:
    """It is rejected before it reaches the batch, whose answers do not change."""
    expected = tokens(run(backend, with_grammar("stays", of_schema(OBJECT), 20))["stays"])
    backend.add(with_grammar("stays", of_schema(OBJECT), 20))
    events = backend.step()
    for grammar in _BAD:
        with pytest.raises((ValueError, RuntimeError)):
            backend.add(with_grammar("bad", grammar))
        events += backend.step()
    while backend.has_work():
        events += backend.step()
    assert {event.request_id for event in events} == {"stays"}
    assert tokens(events) == expected


def test_logprobs_under_a_grammar_are_the_models_own(backend: Backend) -> None:
    """A grammar does not change a token's log-probability."""
    if backend.info.backend == "vllm":
        pytest.skip("vLLM computes them from the tokens that the grammar allows")
    given = request("r", max_tokens=1, logprobs=True)
    free = run(backend, given)["r"]
    only = msgspec.structs.replace(given, id="g", grammar=RegexGrammar("[Q]+"))
    forced = run(backend, only)["g"]
    assert logprobs(forced)[0] < logprobs(free)[0]
    assert all(math.isfinite(value) for value in logprobs(forced))


def test_penalties_and_filters_under_a_grammar(backend: Backend) -> None:
    """No penalty or filter allows a token that the grammar forbids."""
    extremes = [
        SamplingParams(temperature=2, top_k=1, seed=1),
        SamplingParams(temperature=2, top_p=1e-6, seed=1),
        SamplingParams(temperature=2, min_p=1, seed=1),
        SamplingParams(temperature=0, repetition_penalty=0.01, frequency_penalty=2),
        SamplingParams(temperature=1e-4, presence_penalty=-2, seed=1),
    ]
    asked = [
        with_grammar(f"r{i}", RegexGrammar("[ab]{6}"), sampling=s) for i, s in enumerate(extremes)
    ]
    for events in run(backend, *asked).values():
        assert re.fullmatch("[ab]{6}", text(backend, events))


def test_more_grammars_than_are_kept(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dropped grammar is compiled again, and running requests keep theirs."""
    monkeypatch.setattr("app.llm.engine.openvino.grammars.KEPT_BYTES", 600_000)
    backend.add(with_grammar("first", RegexGrammar("[ab]{30}")))
    events = backend.step()
    for i in range(6):
        backend.add(with_grammar(f"r{i}", RegexGrammar(f"[cd]{{3}}{i % 3}")))
        events += backend.step()
    while backend.has_work():
        events += backend.step()
    said = {
        name: text(backend, [e for e in events if e.request_id == name])
        for name in ("first", *(f"r{i}" for i in range(6)))
    }
    assert re.fullmatch("[ab]{30}", said.pop("first"))
    for name, answer in said.items():
        assert re.fullmatch(f"[cd]{{3}}{int(name[1:]) % 3}", answer)


def test_top_logprobs_are_the_likeliest_of_each_place(backend: Backend) -> None:
    """Each token has the requested number of pairs, and a greedy token is the first of them."""
    if "top_logprobs" not in backend.info.supported:
        pytest.skip(f"{backend.info.backend} does not support top_logprobs")
    asked = msgspec.structs.replace(request("r", max_tokens=6, logprobs=True), top_logprobs=4)
    other = request("other", max_tokens=6, logprobs=True)
    answers = run(backend, asked, other)
    places = [place for event in answers["r"] for place in event.top_logprobs]
    assert len(places) == len(tokens(answers["r"]))
    for token, logprob, place in zip(
        tokens(answers["r"]), logprobs(answers["r"]), places, strict=True
    ):
        values = [value for _, value in place]
        assert len({t for t, _ in place}) == 4
        assert values == sorted(values, reverse=True)
        assert place[0][0] == token
        assert place[0][1] == pytest.approx(logprob)
    assert all(event.top_logprobs == [] for event in answers["other"])


def test_top_logprobs_hold_for_sampled_and_constrained_tokens(backend: Backend) -> None:
    """They are the model's likeliest tokens, whether a grammar allows them or not."""
    if "top_logprobs" not in backend.info.supported:
        pytest.skip(f"{backend.info.backend} does not support top_logprobs")
    asked = msgspec.structs.replace(
        request("r", max_tokens=1, logprobs=True), top_logprobs=300, grammar=RegexGrammar("Q+")
    )
    event = run(backend, asked)["r"][0]
    (place,) = event.top_logprobs
    assert len(place) == backend.info.vocabulary_size
    assert dict(place)[event.token_ids[0]] == pytest.approx(event.logprobs[0])
    assert sum(math.exp(value) for _, value in place) == pytest.approx(1, abs=1e-3)
