"""The worker's loop: which requests each step runs, and what the service is told."""

import queue
from collections.abc import Sequence
from typing import cast

import pytest

from app.llm.ebnf.grammars import to_ebnf
from app.llm.engine.echo import EchoBackend
from app.llm.engine.worker import Channel, Worker
from app.llm.protocol import (
    Backend,
    Cancel,
    Command,
    EngineInfo,
    EngineStats,
    GenerationRequest,
    Message,
    RegexGrammar,
    SamplingParams,
    Step,
    Submit,
    TokenEvent,
)


class _Recorder:
    """A backend that notes each step's batch; the end of all work ends the test.

    Attributes:
        batches: The requests of each step.
    """

    def __init__(self) -> None:
        self._backend = EchoBackend()
        self._ids: list[str] = []
        self.batches: list[list[str]] = []

    @property
    def info(self) -> EngineInfo:
        return self._backend.info

    def add(self, request: GenerationRequest) -> None:
        if isinstance(request.grammar, RegexGrammar):
            to_ebnf(request.grammar, None)
        self._ids.append(request.id)
        self._backend.add(request)

    def cancel(self, request_id: str) -> None:
        self._ids.remove(request_id)
        self._backend.cancel(request_id)

    def step(self) -> list[TokenEvent]:
        self.batches.append([*self._ids])
        events = self._backend.step()
        for event in events:
            if event.finish_reason:
                self._ids.remove(event.request_id)
        return events

    def has_work(self) -> bool:
        return self._backend.has_work()

    def stats(self) -> EngineStats:
        return self._backend.stats()


class _NothingMore(Exception):  # noqa: N818 - not an error
    pass


class _Script(Channel):
    """A channel that brings some commands, and then no more.

    Args:
        commands: In order; ``None`` stands for a step before the next one comes.

    Attributes:
        steps: What the worker has reported, in order.
    """

    def __init__(self, commands: Sequence[Command | None]) -> None:
        self.steps: list[Step] = []
        self.commands = cast("queue.SimpleQueue[Command]", self)
        self._left = [*commands]

    def get(self, *, block: bool) -> Command:
        if not self._left and block:
            raise _NothingMore
        command = self._left.pop(0) if self._left else None
        if command is None:
            raise queue.Empty
        return command

    def send(self, message: Message) -> None:
        assert isinstance(message, Step)
        self.steps.append(message)


def submit(name: str, tokens: int) -> Submit:
    """A request for some tokens."""
    return Submit(GenerationRequest(name, [1] * 20, tokens, SamplingParams()))


def work(*commands: Command | None) -> tuple[list[list[str]], list[Step]]:
    """Let a worker of two slots do all of it: each step's batch, and what it has reported."""
    recorder, script = _Recorder(), _Script(commands)
    with pytest.raises(_NothingMore):
        Worker(script, cast("Backend", recorder), max_running=2).run()
    return recorder.batches, script.steps


def ends(steps: Sequence[Step]) -> dict[str, str]:
    """How each request ended."""
    events = [event for step in steps for event in step.events]
    return {e.request_id: e.finish_reason for e in events if e.finish_reason}


def test_a_slot_that_a_step_frees_is_filled_before_the_next_step() -> None:
    """No step runs with an empty slot while a request waits; they start in their order."""
    batches, steps = work(submit("a", 3), submit("b", 1), submit("c", 1), submit("d", 1))
    assert batches == [["a", "b"], ["a", "c"], ["a", "d"]]
    assert set(ends(steps)) == set("abcd")


def test_requests_are_reported_as_started_before_their_first_step() -> None:
    """With how many run then; the service counts on what it is told, and computes none of it."""
    _, steps = work(submit("a", 2), submit("b", 1), submit("c", 1))
    told = [(step.started, len(step.events), step.stats.running) for step in steps]
    assert told == [(["a", "b"], 0, 2), ([], 2, 1), (["c"], 0, 2), ([], 2, 0)]


def test_what_is_cancelled_before_it_has_a_slot_is_never_started() -> None:
    """It ends as cancelled, and the one behind it moves up."""
    commands = [submit("a", 2), submit("b", 2), submit("c", 1), submit("d", 1)]
    batches, steps = work(*commands, Cancel("c"), Cancel("unknown"))
    assert batches == [["a", "b"], ["a", "b"], ["d"]]
    assert ends(steps)["c"] == "cancelled"
    assert "unknown" not in ends(steps)
    assert "c" not in [name for step in steps for name in step.started]


def test_a_cancelled_request_frees_its_slot_before_the_next_step() -> None:
    """Another request has the slot in that step."""
    batches, steps = work(submit("a", 9), submit("b", 2), submit("c", 1), None, Cancel("a"))
    assert batches == [["a", "b"], ["b", "c"]]
    assert ends(steps) == {"a": "cancelled", "b": "length", "c": "length"}


def test_a_request_that_cannot_be_started_takes_no_slot() -> None:
    """It fails alone, and the next one has the slot in the same step."""
    bad = Submit(GenerationRequest("bad", [10_000], 1, SamplingParams()))
    batches, steps = work(submit("a", 2), submit("b", 1), bad, submit("c", 1))
    assert batches == [["a", "b"], ["a", "c"]]
    assert ends(steps)["bad"] == "error"


def test_a_refused_grammar_is_told_from_other_faults() -> None:
    """The event of a request whose grammar the backend rejects says so; other events do not."""
    grammar = RegexGrammar("(")
    bad = Submit(GenerationRequest("bad", [1], 1, SamplingParams(), grammar=grammar))
    odd = Submit(GenerationRequest("odd", [10_000], 1, SamplingParams()))
    _, steps = work(bad, odd, submit("a", 1))
    refused = {e.request_id: e.refused for step in steps for e in step.events}
    assert refused == {"bad": True, "odd": False, "a": False}
