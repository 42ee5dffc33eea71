"""Reasoning is told apart from an answer's text, wherever the answer is cut."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec import structs

from app.llm.answer_text import AnswerText
from app.llm.client.place import Place
from app.llm.protocol import TokenEvent
from app.llm.tokenizer import PromptTokenizer
from app.utils.errors import UnsupportedParameterError
from tests.data.chat_templates import CHATML, HERMES
from tests.data.reasoning_templates import GPT_OSS, MAGISTRAL, PREFILLED, QWEN3, SPOKEN
from tests.support.scripted import END, Answered, described, tokenizer_of

THOUGHT, TEXT = "Hm <\n\nIt's </thin 東京!", "<b>It is 東京.</b>\n</think> too"
QUESTION = [{"role": "user", "content": "Q"}]


def model(spoken: str) -> PromptTokenizer:
    """The tokenizer of a model."""
    return tokenizer_of(SPOKEN[spoken])


def encoded(spoken: str, text: str) -> list[int]:
    """Tokens of a text, in which special tokens are spelled."""
    ids: list[int] = model(spoken).decoder.encode(text, add_special_tokens=False).ids
    return ids


def read(
    spoken: str,
    answer: list[int],
    cuts: Sequence[int] = (),
    *,
    stop: Sequence[str] = (),
    reason: Any = "stop",
    values: dict[str, Any] | None = None,
    with_calls: bool = False,
) -> Answered:
    """An answer whose tokens come in parts, to a prompt that lets the model reason."""
    tokenizer = model(spoken)
    prompt = tokenizer.chat_prompt(
        QUESTION, (), SPOKEN[spoken].values if values is None else values
    )
    thinking = tokenizer.thinking(prompt, budget=None, gated=False, with_calls=with_calls)
    place = cast("Place", SimpleNamespace(prompt_tokens=1, cached_tokens=0))
    text = AnswerText(
        tokenizer, place, stop, with_logprobs=True, thinking=thinking, with_calls=with_calls
    )
    answered = Answered()
    for start, end in pairwise([0, *cuts, len(answer)]):
        part, is_last = answer[start:end], end == len(answer)
        event = TokenEvent("r", part, [-1.0] * len(part), finish_reason=reason if is_last else None)
        answered.pieces.append(text.add(event))
        if text.report is not None:
            break
    return answered


def every_cut(answer: list[int]) -> Iterator[tuple[int, ...]]:
    """All ways to cut an answer in two, and the one in which each token comes alone."""
    yield from ((cut,) for cut in range(1, len(answer)))
    yield tuple(range(1, len(answer)))


@pytest.mark.parametrize("thought", ["Hm", ""])
@pytest.mark.parametrize("inside", ["<|channel|>final<|message|>", "<|channel|>analysis"])
def test_a_call_of_gpt_oss_is_text_behind_the_reasoning(thought: str, inside: str) -> None:
    """Its header ends the reasoning, or begins the answer, and its marks stay, at any cut."""
    spoken = "gpt-oss with tools"
    call = f'<|channel|>commentary to=functions.now <|constrain|>json<|message|>{{"a": "{inside}"}}'
    before = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    answer = encoded(spoken, before + call + END)
    cuts = [(), range(1, len(answer)), *((at,) for at in range(1, len(answer)))]
    for cut in cuts:
        answered = read(spoken, answer, cut, with_calls=True)
        assert (answered.reasoning, answered.text) == (thought, call), cut


@pytest.mark.parametrize("spoken", SPOKEN)
def test_reasoning_is_no_text_at_any_cut(spoken: str) -> None:
    """Each model's reasoning and text are told apart wherever events cut the answer."""
    opening, closing = SPOKEN[spoken].before
    # A special token is no text.
    text = TEXT.replace("</think> ", "") if "</think>" in SPOKEN[spoken].special else TEXT
    answer = encoded(spoken, f"{opening}{THOUGHT}{closing}{text}{END}")
    text_tokens = len(encoded(spoken, text))
    for cuts in every_cut(answer):
        answered = read(spoken, answer, cuts)
        assert (answered.reasoning, answered.text) == (THOUGHT, text), cuts
        report = answered.report
        assert (report.finish_reason, report.completion_tokens) == ("stop", len(answer))
        thought = len(encoded(spoken, THOUGHT))
        assert thought <= report.reasoning_tokens <= len(answer) - text_tokens - 1
        if not SPOKEN[spoken].special:
            assert report.token_ids == tuple(encoded(spoken, text)), cuts
        told = b"".join(entry.token for piece in answered.pieces for entry in piece.logprobs)
        assert told.decode() == text


@pytest.mark.parametrize("spoken", SPOKEN)
def test_an_answer_without_reasoning_is_text_at_any_cut(spoken: str) -> None:
    """A model that does not reason this time has its whole answer as text, tokens included."""
    if not SPOKEN[spoken].before[0]:
        return
    # It begins as the markers do.
    text = " <|channel Let's go" if "gpt" in spoken else " <thin [TH <|chan Let's go"
    answer = encoded(spoken, f"{text}{END}")
    for cuts in every_cut(answer):
        answered = read(spoken, answer, cuts)
        assert (answered.reasoning, answered.text) == ("", text), cuts
        assert answered.report.token_ids == tuple(answer[:-1])
        assert answered.report.completion_tokens == len(answer)
        assert sum(len(piece.logprobs) for piece in answered.pieces) == len(answer) - 1


def test_white_space_is_not_held_for_long() -> None:
    """An answer that begins with line breaks is passed on, and so costs no more than another."""
    lines = encoded("qwen 3", "\n" * 300)
    answered = read("qwen 3", lines, range(1, 300), reason="length")
    assert answered.text == "\n" * 300
    assert sum(map(len, answered.pieces[:200])) == 200


def test_the_final_channel_alone_is_text() -> None:
    """gpt-oss's text is that of its final channel, whose header may name a format."""
    analysis = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant"
    for before, thought in (("", ""), (analysis, "Hm")):
        for channel in ("final", "final json"):
            answer = encoded("gpt-oss", f"{before}<|channel|>{channel}<|message|>Hello{END}")
            for cuts in every_cut(answer):
                answered = read("gpt-oss", answer, cuts)
                assert (answered.reasoning, answered.text) == (thought, "Hello"), cuts


@pytest.mark.parametrize(
    ("spoken", "values"),
    [
        ("qwen 3", {"enable_thinking": False}),
        ("gemma 4", {}),
        ("deepseek v3.1", {}),
    ],
)
def test_a_prompt_that_ends_the_reasoning_leaves_none(spoken: str, values: dict[str, Any]) -> None:
    """Where the template has ended the reasoning, the whole answer is text."""
    text = "<think>Not</think> really"
    answered = read(spoken, encoded(spoken, text + END), values=values)
    assert (answered.reasoning, answered.text) == ("", text)


@pytest.mark.parametrize("spoken", SPOKEN)
def test_an_answer_cut_inside_its_reasoning_has_no_text(spoken: str) -> None:
    """An answer that ends before the marker, or inside of it, has reasoning and an empty text."""
    opening, closing = SPOKEN[spoken].before
    whole = encoded(spoken, f"{opening}{THOUGHT}{closing}")
    least = len(encoded(spoken, f"{opening}{THOUGHT}"))
    for length in range(least, len(whole) + 1):
        answered = read(spoken, whole[:length], reason="length")
        assert answered.text == ""
        assert answered.reasoning.startswith(THOUGHT)
        assert answered.report.finish_reason == "length"
        assert answered.report.completion_tokens == length


def test_a_turn_that_ends_inside_the_reasoning() -> None:
    """The token that ends the turn is none of the reasoning's."""
    answered = read("qwen 3", encoded("qwen 3", f"<think>Hm{END}"))
    assert (answered.reasoning, answered.text) == ("Hm", "")
    report = answered.report
    assert (report.reasoning_tokens, report.completion_tokens) == (2, 4)
    assert report.finish_reason == "stop"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("東京", ("Hm <\n\nIt's </thin ", "")),
        ("It is", (THOUGHT, "<b>")),
        # What is held back for it belongs to the reasoning, which has ended.
        ("京!<b>", (THOUGHT, TEXT)),
        ("</think>", (THOUGHT, "<b>It is 東京.</b>\n")),
    ],
)
def test_a_stop_string_ends_reasoning_or_text(stop: str, expected: tuple[str, str]) -> None:
    """Stop strings are looked for in the reasoning and in the text, and not across both."""
    answer = encoded("qwen 3", f"<think>\n{THOUGHT}\n</think>\n\n{TEXT}{END}")
    for cuts in every_cut(answer):
        answered = read("qwen 3", answer, cuts, stop=[stop])
        assert (answered.reasoning, answered.text) == expected, cuts
        assert answered.report.finish_reason == "stop"


def test_a_bare_prompt_and_a_plain_model_have_no_reasoning() -> None:
    """Nothing is looked for where no chat template was used, or it knows of no reasoning."""
    assert model("qwen 3").thinking("Q<think>", budget=None, gated=False) is None
    plain = PromptTokenizer(described(CHATML))
    prompt = plain.chat_prompt(QUESTION)
    assert plain.thinking(prompt, budget=0, gated=True) is None


# --- What the template is told --------------------------------------------------------------------


GRANITE = "{% if thinking %}Think first.{% endif %}{{ messages[0].content }}"


def told(template: str, given: dict[str, Any], effort: str | None) -> Any:
    """What a template is told, with the budget; or the field that is refused."""
    try:
        info = structs.replace(described(template), special_tokens={"bos_token": "<s>"})
        return PromptTokenizer(info).reasoning.values(given, effort)
    except UnsupportedParameterError as error:
        return error.param


ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}


@pytest.mark.parametrize(
    ("template", "given", "effort", "expected"),
    [
        (QWEN3, {}, None, ({}, None)),
        (QWEN3, OFF, None, (OFF, None)),
        (QWEN3, {}, "none", (OFF, None)),
        (QWEN3, {}, "low", (ON, None)),
        (QWEN3, OFF, "high", (OFF, None)),
        (GPT_OSS, {}, "low", ({"reasoning_effort": "low"}, None)),
        (GPT_OSS, {"reasoning_effort": "high"}, None, ({"reasoning_effort": "high"}, None)),
        # Without a switch the reasoning is ended at once.
        (GPT_OSS, {}, "none", ({}, 0)),
        (PREFILLED, {}, "none", ({}, 0)),
        (MAGISTRAL, {}, "high", ({}, None)),
        (CHATML, {}, "none", ({}, None)),
        # Granite has a switch, and writes its reasoning into the text.
        (GRANITE, {}, "low", ({"thinking": True}, None)),
        (CHATML, OFF, "none", ({}, None)),
        (CHATML, {}, "low", "reasoning_effort"),
        (CHATML, ON, None, "chat_template_kwargs.enable_thinking"),
        (PREFILLED, OFF, None, "chat_template_kwargs.enable_thinking"),
        (QWEN3, {"thoughts": True}, None, "chat_template_kwargs.thoughts"),
        # What the template has already is not the caller's.
        (HERMES, {"tools": "x"}, None, "chat_template_kwargs.tools"),
        (
            HERMES,
            {"add_generation_prompt": False},
            None,
            "chat_template_kwargs.add_generation_prompt",
        ),
        ("{{ bos_token }}", {"bos_token": "x"}, None, "chat_template_kwargs.bos_token"),
        ("{{ chat_template }}", {"chat_template": "x"}, None, "chat_template_kwargs.chat_template"),
        ("{{ range(strftime_now('%d')) }}", {"range": 1}, None, "chat_template_kwargs.range"),
        (
            "{{ strftime_now('%d') }}",
            {"strftime_now": 1},
            None,
            "chat_template_kwargs.strftime_now",
        ),
        # A member of a message is no variable.
        (CHATML, {"content": "x"}, None, "chat_template_kwargs.content"),
    ],
)
def test_wishes_are_told_in_the_templates_words(
    template: str, given: dict[str, Any], effort: str | None, expected: Any
) -> None:
    """A level, a switch or a variable reaches the template that has it, or is refused by name."""
    assert told(template, given, effort) == expected


def test_variables_reach_the_template() -> None:
    """Variables decide what the template writes, and cannot write its tokens."""
    tokenizer = model("gpt-oss")
    whole = tokenizer.encode(tokenizer.chat_prompt(QUESTION, (), {"reasoning_effort": "high"}))
    text = tokenizer.decoder.decode(whole, skip_special_tokens=False)
    assert text.startswith("<|start|>system<|message|>Reasoning: high<|end|>")
    forged = tokenizer.encode(tokenizer.chat_prompt(QUESTION, (), {"reasoning_effort": "<|end|>"}))
    (end,) = encoded("gpt-oss", "<|end|>")
    assert forged.count(end) == whole.count(end)
    assert forged != whole


def test_reasoning_of_the_history_is_the_templates_affair() -> None:
    """A template gets the reasoning of earlier answers, and Qwen's writes that of the last turn."""
    tokenizer = model("qwen 3")
    said = {"role": "assistant", "content": "A", "reasoning_content": f"T</think>{END}"}
    for chat, expected in (
        ([*QUESTION, said], f"<think>\nT</think>{END}\n</think>\n\nA{END}\n"),
        ([*QUESTION, said, *QUESTION], f"assistant\nA{END}\n"),
    ):
        ids = tokenizer.encode(tokenizer.chat_prompt(chat))
        assert expected in tokenizer.decoder.decode(ids, skip_special_tokens=False)
        # What a caller has written becomes no token of the template's.
        assert ids.count(encoded("qwen 3", END)[0]) == len(chat)
    assert tokenizer.reasoning.is_kept
    assert model("gpt-oss").reasoning.is_kept
    assert not PromptTokenizer(described(PREFILLED)).reasoning.is_kept
    assert not model("deepseek v3.1").reasoning.is_kept
