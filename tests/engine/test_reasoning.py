"""The two requests to the engine of an answer whose reasoning has a limit or no grammar."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from msgspec import structs

from app.llm.chain import ServedPipeline
from app.llm.generator import GenerationOptions
from app.llm.protocol import JsonSchemaGrammar, RegexGrammar, SamplingParams
from app.llm.tools import Tool, ToolUse
from app.utils.errors import DeadlineExceededError
from tests.data.reasoning_templates import QWEN3, SPOKEN, Spoken
from tests.support.scripted import END, ScriptedEngine

ANALYSIS = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>"
FINAL = "<|channel|>final<|message|>"
JSON = ANALYSIS.replace("final", "final json")
GRAMMAR = JsonSchemaGrammar('{"type": "object"}')


def engine(*answers: str, spoken: str = "qwen 3", group: int = 1, **limits: Any) -> ScriptedEngine:
    """An engine of a model that reasons."""
    return ScriptedEngine(SPOKEN[spoken], *answers, group=group, **limits)


def prompts(engine: ScriptedEngine) -> list[str]:
    """The ends of the prompts, from where the answer begins."""
    texts = [engine.spelled(request.prompt_token_ids) for request in engine.requests]
    first = texts[0]
    return [text.removeprefix(first) for text in texts]


@pytest.mark.parametrize("group", [1, 3, 1000])
async def test_a_grammar_holds_behind_the_reasoning_alone(group: int) -> None:
    """The reasoning has no grammar; the text has, and goes on where the reasoning has ended."""
    scripted = engine(f"<think>\nHm\n</think>\n\nno json{END}", f'{{"a": 1}}{END}', group=group)
    answered = await scripted.ask(grammar=GRAMMAR, max_tokens=100)
    assert (answered.reasoning, answered.text) == ("Hm", '{"a": 1}')
    first, second = scripted.requests
    assert first.grammar is None
    assert isinstance(second.grammar, JsonSchemaGrammar | RegexGrammar)
    assert prompts(scripted) == ["", "<think>\nHm\n</think>\n\n"]
    said = len(second.prompt_token_ids) - len(first.prompt_token_ids)
    assert second.max_tokens == 100 - said
    assert answered.report.completion_tokens == said + len(scripted.ids(answered.text)) + 1
    assert answered.report.prompt_tokens == len(first.prompt_token_ids)
    assert answered.report.token_ids == tuple(scripted.ids('{"a": 1}'))
    assert answered.report.finish_reason == "stop"
    assert scripted.queue.is_empty
    assert scripted.value("llm_request_duration_seconds_count", finish_reason="stop") == 1
    assert scripted.value("llm_request_queue_seconds_count") == 1


@pytest.mark.parametrize(
    ("spoken", "first", "behind"),
    [
        # It begins its text at once, or ends its turn: nothing of that stays.
        ("qwen 3", f"Sure{END}", ""),
        ("qwen 3", END, ""),
        ("gpt-oss", f"Sure{END}", "<|channel|>final<|message|>"),
        ("gpt-oss", f"<|channel|>final<|message|>Sure{END}", "<|channel|>final<|message|>"),
        # It ends its turn without an answer.
        ("qwen 3", f"<think>\nHm{END}", "<think>\nHm\n</think>\n\n"),
        # The reasoning is empty.
        ("qwen 3", f"<think>\n\n</think>\n\n{END}", "<think>\n\n</think>\n\n"),
        ("gpt-oss", f"{ANALYSIS}x{END}", ANALYSIS),
        ("gpt-oss", f"{JSON}x{END}", JSON),
        ("magistral", f"[THINK]Hm[/THINK]x{END}", "[THINK]Hm[/THINK]"),
        ("gemma 4", f"<|channel>thought\nHm<channel|>x{END}", "<|channel>thought\nHm<channel|>"),
        ("deepseek v3.1", f"Hm</think>x{END}", "Hm</think>\n\n"),
        ("markers without tokens", f"<think>Hm</think>x{END}", "<think>Hm</think>\n\n"),
    ],
)
@pytest.mark.parametrize("group", [1, 2, 1000])
async def test_where_a_grammar_begins(spoken: str, first: str, behind: str, group: int) -> None:
    """However the model begins, its text is asked for behind the reasoning's end."""
    scripted = engine(first, f"{{}}{END}", spoken=spoken, group=group)
    answered = await scripted.ask(grammar=GRAMMAR, max_tokens=200, values=SPOKEN[spoken].values)
    assert answered.text == "{}"
    assert answered.reasoning == ("Hm" if "Hm" in first else "")
    assert prompts(scripted) == ["", behind]


CALL = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"
THOUGHT = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant"


@pytest.mark.parametrize("group", [1, 2, 1000])
@pytest.mark.parametrize(("second", "text"), [(CALL, CALL), (f"{FINAL}Yes", "Yes"), (FINAL, "")])
@pytest.mark.parametrize(
    ("first", "behind"),
    [
        (THOUGHT + CALL, THOUGHT),
        (f"{ANALYSIS}x", THOUGHT),
        (CALL, ""),
        (f"{FINAL}x", ""),
        ("<|channel|>analysis<|message|>Hm", THOUGHT),
    ],
)
async def test_a_grammar_chooses_between_a_call_and_the_final_channel(
    first: str, behind: str, second: str, text: str, group: int
) -> None:
    """gpt-oss writes a call, or its final channel, whose header is no text, after its reasoning."""
    scripted = engine(first + END, second + END, spoken="gpt-oss with tools", group=group)
    grammar = scripted.tokenizer.tool_format.grammar(ToolUse((Tool("now"),)))
    answered = await scripted.ask(grammar=grammar, with_calls=True, max_tokens=300)
    assert (answered.reasoning, answered.text) == ("Hm" if behind else "", text)
    assert prompts(scripted) == ["", behind]
    assert [request.grammar is None for request in scripted.requests] == [True, False]


async def test_the_first_request_is_cancelled() -> None:
    """The engine stops the first request where the second begins, and it is no caller's leaving."""
    scripted = engine("<think>\nHm\n</think>\n\n", f"{{}}{END}")
    assert (await scripted.ask(grammar=GRAMMAR)).text == "{}"
    assert scripted.cancelled == [scripted.requests[0].id]
    assert scripted.value("llm_requests_cancelled_total") == 0


async def test_a_token_that_has_the_markers_end_and_more() -> None:
    """Text in the marker's last token is the answer's; before a grammar it is generated anew."""
    joined = Spoken(QWEN3, ("<think>", "</think>\n\n"), {}, plain=("k>\n\nHi",))
    first = f"<think>Hm</think>\n\nHi there{END}"
    answered = await ScriptedEngine(joined, first).ask()
    assert (answered.reasoning, answered.text) == ("Hm", "Hi there")
    scripted = ScriptedEngine(joined, first, f"{{}}{END}")
    answered = await scripted.ask(grammar=GRAMMAR)
    assert (answered.reasoning, answered.text) == ("Hm", "{}")
    assert prompts(scripted) == ["", "<think>Hm</think>\n\n"]


async def test_a_prompt_without_reasoning_needs_one_request() -> None:
    """Where the template has ended the reasoning, the grammar holds from the beginning."""
    scripted = engine(f"{{}}{END}")
    answered = await scripted.ask(grammar=GRAMMAR, values={"enable_thinking": False})
    assert answered.text == "{}"
    (request,) = scripted.requests
    assert request.grammar is not None


@pytest.mark.parametrize("spoken", SPOKEN)
@pytest.mark.parametrize("group", [1, 4, 1000])
async def test_a_budget_ends_the_reasoning(spoken: str, group: int) -> None:
    """The reasoning has at most the budget's tokens; the model goes on behind the marker."""
    kind = SPOKEN[spoken]
    opening, _ = kind.before
    scripted = engine(f"{opening}I muse{END}", f"So{END}", spoken=spoken, group=group)
    answered = await scripted.ask(thinking_budget=4, max_tokens=200, values=kind.values)
    assert "I muse".startswith(answered.reasoning)
    assert len(answered.reasoning) >= 3
    assert answered.text == "So"
    form = scripted.tokenizer.reasoning.form
    assert form is not None
    _, behind = prompts(scripted)
    assert behind.startswith(f"{opening.rstrip()}")
    assert behind.endswith(form.forced_end)
    report = answered.report
    assert report.reasoning_tokens == 4
    assert report.completion_tokens == len(scripted.ids(behind)) + len("So") + 1


async def test_a_budget_of_none_ends_it_in_the_prompt() -> None:
    """Reasoning that the prompt opens is ended there by a budget of 0, in one request."""
    scripted = engine(f"So{END}", spoken="deepseek r1")
    answered = await scripted.ask(thinking_budget=0)
    assert (answered.reasoning, answered.text) == ("", "So")
    (request,) = scripted.requests
    assert scripted.spelled(request.prompt_token_ids).endswith("<think>\n\n</think>\n\n")
    assert answered.report.completion_tokens == 3


@pytest.mark.parametrize("options", [{}, {"grammar": GRAMMAR}, {"thinking_budget": 5}])
async def test_all_tokens_spent_on_reasoning(options: dict[str, Any]) -> None:
    """An answer without a token left for its text is cut, and its text is empty."""
    scripted = engine(f"<think>\nI muse and muse{END}", f"So{END}")
    begun = len(scripted.ids("<think>\nI mus"))
    answered = await scripted.ask(max_tokens=begun, **options)
    assert answered.text == ""
    assert answered.reasoning.startswith("I mu")
    assert answered.report.finish_reason == "length"
    assert len(scripted.requests) == 1
    assert scripted.queue.is_empty
    assert scripted.value("llm_request_duration_seconds_count", finish_reason="length") == 1


async def test_fields_of_the_second_request() -> None:
    """Its least number of tokens is what the first has left; log-probabilities are the text's."""
    scripted = engine(f"<think>\nHmmmmm{END}", f"So{END}")
    sampling = SamplingParams(min_tokens=20, seed=7)
    answered = await scripted.ask(sampling=sampling, thinking_budget=2, max_tokens=200, logprobs=0)
    first, second = scripted.requests
    said = len(second.prompt_token_ids) - len(first.prompt_token_ids)
    assert second.sampling == structs.replace(sampling, min_tokens=20 - said)
    told = [entry for piece in answered.pieces for entry in piece.logprobs]
    assert [(entry.token, entry.start) for entry in told] == [(b"S", 0), (b"o", 1)]


@pytest.mark.parametrize("leg", [1, 2])
async def test_a_caller_that_leaves_stops_either_request(leg: int) -> None:
    """Whoever leaves in the reasoning or in the text leaves nothing behind."""
    scripted = engine(f"<think>\n{'m' * 50}", f"{'t' * 50}")
    options = GenerationOptions(thinking_budget=10, max_tokens=500)
    prompt = scripted.tokenizer.chat_prompt([{"role": "user", "content": "Q"}])
    async with aclosing(scripted.generator.stream(prompt, options)) as pieces:
        async for piece in pieces:
            if piece if leg == 2 else piece.reasoning:
                break
    assert len(scripted.requests) == leg
    assert scripted.cancelled[-1] == scripted.requests[-1].id
    assert scripted.queue.is_empty
    assert scripted.value("llm_requests_cancelled_total") == 1


async def test_the_deadline_holds_for_both_requests() -> None:
    """A request that goes on has no more time than one that does not."""
    scripted = engine(
        f"<think>\nHm{END}", f"{'t' * 5000}{END}", request_timeout_seconds=0.05, group=1000
    )
    scripted.pause = asyncio.Event()
    with pytest.raises(DeadlineExceededError):
        await scripted.ask(grammar=GRAMMAR, max_tokens=6000)
    assert len(scripted.requests) == 2
    assert scripted.queue.is_empty


async def test_langchain_has_the_reasoning_beside_the_text() -> None:
    """A LangChain program gets the text, and the reasoning in generation_info."""
    scripted = engine(*(f"<think>\nHm\n</think>\n\nSo{END}" for _ in range(2)))
    pipeline = ServedPipeline(
        model_id="scripted", generator=scripted.generator, loop=asyncio.get_running_loop()
    )
    prompt = scripted.tokenizer.chat_prompt([{"role": "user", "content": "Q"}])
    ((generation,),) = (await pipeline.agenerate([prompt])).generations
    info = generation.generation_info or {}
    assert (generation.text, info["reasoning_content"], info["finish_reason"]) == (
        *("So", "Hm"),
        "stop",
    )
    assert "".join([piece async for piece in pipeline.astream(prompt)]) == "So"
