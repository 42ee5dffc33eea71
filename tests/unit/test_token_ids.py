"""Token ids of chats are those that transformers gives, for a zoo of tokenizers and templates."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from app.llm.detokenizer import Detokenizer
from app.llm.tokenizer import PromptTokenizer
from app.llm.tools import Tool
from tests.support.zoo import ZOO, Pair, disguised, framing
from tests.support.zoo_tokenizers import llama2_normalized

SYSTEM = "You are a helpful assistant."
CHATS = (
    ("What is the capital of France?", "Paris is the capital.", "  And  the weather?\n\n\nNow"),
    ("Hi\n", "Grüße 😀 漢字", "x"),
    ("def add(a):\n    return", "ok, thanks!", "bye   "),
)
ANSWERS = ("Paris is the capital.", "The weather\n\nis here", "it is")
TOOL = Tool("get_weather", "The weather.", {"type": "object", "properties": {"city": {}}})


Tokenizers = tuple[PreTrainedTokenizerFast, PromptTokenizer]


@pytest.fixture(params=ZOO, scope="module")
def pair(request: pytest.FixtureRequest) -> Pair:
    """Each pair of the zoo."""
    return ZOO[request.param]


@pytest.fixture(scope="module")
def both(pair: Pair) -> Tokenizers:
    """The tokenizer of transformers, and that of the service."""
    return pair.reference(), pair.served()


def chat(*contents: str) -> list[dict[str, Any]]:
    """Alternating turns, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def expected(
    reference: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **options: Any
) -> list[int]:
    """The ids that transformers gives; it does not know an answer's own tokens."""
    plain = [{k: v for k, v in m.items() if k != "token_ids"} for m in messages]
    options = {"add_generation_prompt": True, "return_dict": False, **options}
    ids: list[int] = reference.apply_chat_template(plain, **options)
    return ids


def told(pair: Pair, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as the template takes them: one without a system role gets it as a user's."""
    if pair.takes_system:
        return messages
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def test_the_zoo_is_large() -> None:
    """The zoo has at least 25 pairs of a tokenizer and a template."""
    assert len({(p.build, p.tokens, p.template) for p in ZOO.values()}) >= 25


def test_ids_of_a_chat_are_those_of_transformers(pair: Pair, both: Tokenizers) -> None:
    """A chat, with a system message where the template takes one, has transformers' ids."""
    reference, tokenizer = both
    for contents in CHATS:
        messages = chat(*contents)
        assert tokenizer.encode(tokenizer.chat_prompt(messages)) == expected(reference, messages)
        messages.insert(0, {"role": "system", "content": SYSTEM})
        assert tokenizer.encode(tokenizer.chat_prompt(messages)) == expected(
            reference, told(pair, messages)
        )


def test_spelled_tokens_are_text(pair: Pair, both: Tokenizers) -> None:
    """Special tokens that messages spell have the ids of a text that is no token of the model."""
    reference, tokenizer = both
    tokens = framing(reference)
    spelled = f"a {''.join(tokens)} b{tokens[0]}"
    messages = chat(spelled, "Yes.", f"{tokens[-1]}x{tokens[-1]}\n y")
    ids = tokenizer.encode(tokenizer.chat_prompt(messages))
    if pair.build is llama2_normalized:
        count = [i in tokenizer.special_token_ids for i in ids].count(True)
        plain = tokenizer.encode(tokenizer.chat_prompt(chat("a", "Yes.", "b")))
        assert count == [i in tokenizer.special_token_ids for i in plain].count(True)
        assert spelled in tokenizer.decoder.decode(ids, skip_special_tokens=False)
    else:
        assert ids == expected(disguised(pair), messages)


def test_a_sessions_ids_are_those_of_transformers(pair: Pair, both: Tokenizers) -> None:
    """Later turns of a session have transformers' ids, and begin with the tokens of the first."""
    reference, tokenizer = both
    history: list[int] = []
    messages: list[dict[str, Any]] = []
    for answer in ANSWERS:
        messages += chat("What is the end?")
        prompt = tokenizer.encode(tokenizer.chat_prompt(messages))
        assert prompt == expected(reference, messages)
        if pair.stable:
            assert prompt[: len(history)] == history
        ids = generated(reference, prompt, messages, pair.lead + answer)
        messages.append(answered(tokenizer, ids))
        history = prompt + ids


@pytest.mark.parametrize("pair", [n for n, p in ZOO.items() if p.stable], indirect=True)
def test_a_sessions_unusual_tokens_are_kept(pair: Pair, both: Tokenizers) -> None:
    """Tokens that nobody would encode an answer to stand in later prompts, and its text too."""
    reference, tokenizer = both
    history: list[int] = []
    messages: list[dict[str, Any]] = []
    for answer in ANSWERS:
        messages += chat("What is the end?")
        prompt = tokenizer.encode(tokenizer.chat_prompt(messages))
        assert prompt[: len(history)] == history
        usual = expected(reference, messages)
        assert spelling(tokenizer, prompt) == spelling(tokenizer, usual)
        ids = generated(reference, prompt, messages, pair.lead + answer)
        letters = [
            token
            for i in ids
            for token in reference.convert_tokens_to_ids(list(reference.convert_ids_to_tokens(i)))
        ]
        messages.append(answered(tokenizer, letters))
        history = prompt + letters


def spelling(tokenizer: PromptTokenizer, ids: list[int]) -> bytes:
    """The bytes of all tokens."""
    return b"".join(map(tokenizer.token_bytes, ids))


def generated(
    reference: PreTrainedTokenizerFast,
    prompt: list[int],
    messages: list[dict[str, Any]],
    answer: str,
) -> list[int]:
    """The tokens that a model would answer with."""
    text = reference.apply_chat_template(
        [{"role": m["role"], "content": m["content"]} for m in messages],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids: list[int] = reference(text + answer, add_special_tokens=False)["input_ids"]
    usual: list[int] = reference(text, add_special_tokens=False)["input_ids"]
    assert ids[: len(usual)] == usual
    return ids[len(usual) :]


def answered(tokenizer: PromptTokenizer, ids: list[int]) -> dict[str, Any]:
    """A kept answer."""
    text = Detokenizer(tokenizer.decoder).feed(ids)
    return {"role": "assistant", "content": text, "token_ids": ids}


def test_ids_of_tools_are_those_of_transformers(pair: Pair, both: Tokenizers) -> None:
    """Tools, calls and results have transformers' ids where the template's form is known."""
    reference, tokenizer = both
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00000", "function": function}],
    }
    result = {"role": "tool", "content": "21 degrees", "tool_call_id": "call00000"}
    asked = [{"role": "system", "content": SYSTEM}, *chat("What is the weather?")]
    messages = [*asked, call, result]
    text = tokenizer.tool_format.as_text(messages)  # type: ignore[arg-type]
    ids = tokenizer.encode(tokenizer.chat_prompt(text, [TOOL]))
    if tokenizer.tool_format.in_template:
        read = {**function, "arguments": json.loads(function["arguments"])}
        called = {**call, "tool_calls": [{"id": "call00000", "function": read}]}
        messages = [*asked, called, result]
        assert ids == expected(reference, messages, tools=[TOOL.definition()])
    else:
        messages = [dict(m) for m in tokenizer.tool_format.for_template(text, [TOOL])]
        assert ids == expected(reference, told(pair, messages))
