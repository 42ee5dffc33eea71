"""Asks a backend for JSON of random schemas, and checks the answers."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from app.llm.protocol import Backend, GenerationRequest, Grammar, JsonSchemaGrammar, SamplingParams
from tests.support.backends import run, tokens
from tests.support.random_schemas import RandomSchemas


def ask_for_schemas(
    backend: Backend, count: int, *, max_tokens: int, described: bool, batch: int = 32
) -> Counter[str]:
    """Ask the model for a value of each of many random schemas.

    Half of the answers are greedy, half are sampled.

    Args:
        backend: Runs the model.
        count: Number of schemas.
        max_tokens: Most tokens of each answer.
        described: Whether the prompts contain the schemas; their prefill takes longer than answers.
        batch: Number of requests at once.

    Returns:
        Number of answers by finish reason.

    Raises:
        AssertionError: A complete answer does not match its schema, or a request failed.
    """
    random = RandomSchemas(seed=1)
    made = [random.one() for _ in range(count)]
    asked = [(schema, JsonSchemaGrammar(json.dumps(schema, ensure_ascii=False))) for schema in made]
    return ask_of(backend, asked, max_tokens=max_tokens, described=described, batch=batch)


def ask_of(
    backend: Backend,
    asked: Sequence[tuple[dict[str, Any], Grammar]],
    *,
    max_tokens: int,
    described: bool = False,
    batch: int = 32,
) -> Counter[str]:
    """What :func:`ask_for_schemas` does, for these schemas and the grammars that hold them."""
    tokenizer = Tokenizer.from_str(backend.info.tokenizer_json)
    reasons: Counter[str] = Counter()
    for start in range(0, len(asked), batch):
        some = asked[start : start + batch]
        requests = [
            msgspec.structs.replace(
                _request(tokenizer, start + i, schema, max_tokens, described), grammar=grammar
            )
            for i, (schema, grammar) in enumerate(some)
        ]
        answers = run(backend, *requests)
        for (schema, _), given in zip(some, requests, strict=True):
            events = answers[given.id]
            reason = events[-1].finish_reason
            assert reason in {"stop", "length"}, (schema, events[-1].error)
            reasons[reason] += 1
            if reason == "stop":
                _check(schema, tokenizer.decode(tokens(events)))
    return reasons


def _request(
    tokenizer: Tokenizer, number: int, schema: dict[str, Any], max_tokens: int, described: bool
) -> GenerationRequest:
    text = json.dumps(schema, ensure_ascii=False)
    question = "Give an example of JSON" + (f" of this schema: {text}" if described else "")
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return GenerationRequest(
        id=str(number),
        prompt_token_ids=tokenizer.encode(prompt).ids,
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=number % 2, seed=number),
    )


def _check(schema: dict[str, Any], answer: str) -> None:
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    faults: Sequence[Any] = list(validator.iter_errors(json.loads(answer)))
    assert not faults, f"{answer} is not of {schema}: {faults[0].message}"
