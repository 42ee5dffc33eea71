"""Random schemas, those of programs, and a real model: complete answers match their schemas.

`make schemas` runs 200 on each engine and prints how many answers were complete.
"""

import json
import os
import sys

import pytest

from app.llm.ebnf.fitting import fit
from app.llm.models import bundled
from app.llm.protocol import JsonSchemaGrammar
from tests.data.program_schemas import OLD, schemas
from tests.support.backends import load_bundled
from tests.support.structured import ask_for_schemas, ask_of

_COUNT = int(os.environ.get("SCHEMAS", "0"))
_FEW, _MANY = (3, 32), (_COUNT, 200)
"""Schemas, and tokens of each answer, in the suite and of `make schemas`."""


@pytest.mark.no_cover
@pytest.mark.model
@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("auto", id="openvino"),
        # On a CPU it takes about ten times as long.
        pytest.param("transformers", marks=pytest.mark.full_size),
    ],
)
def test_complete_answers_match_their_schemas(engine: str) -> None:
    """Of 32 answers at once, half of them sampled, each complete one matches its schema."""
    if not bundled.is_fetched():
        pytest.skip("the bundled model is not here; `make model` fetches it")
    backend = load_bundled(engine)
    count, max_tokens = _MANY if _COUNT else _FEW
    reasons = ask_for_schemas(backend, count, max_tokens=max_tokens, described=bool(_COUNT))
    sys.stdout.write(
        f"{backend.info.backend}: {reasons['stop']} of {count} answers complete"
        f" in {max_tokens} tokens\n"
    )
    assert reasons["stop"] > count // 4, reasons


_SOME = (
    "zod: mult",
    "openapi: a map of some",
    "zod: record_of_pattern",
    "pydantic: frozenset",
)


@pytest.mark.no_cover
@pytest.mark.model
@pytest.mark.parametrize(
    "names", [pytest.param(_SOME, id="some"), pytest.param((), marks=pytest.mark.full_size)]
)
def test_answers_of_programs_schemas_are_valid(names: tuple[str, ...]) -> None:
    """With OpenVINO each complete answer of a schema that is held matches it; most are complete."""
    if not bundled.is_fetched():
        pytest.skip("the bundled model is not here; `make model` fetches it")
    backend = load_bundled("auto")
    held = {}
    for name, schema in schemas():
        if name in OLD or name not in (names or (name,)):
            continue
        grammar = JsonSchemaGrammar(json.dumps(schema), strict=False)
        fitted, dropped = fit(grammar, backend.info.vocabulary_size)
        if not dropped:
            held[name] = (schema, fitted)
    assert len(held) >= (len(names) or 160)
    reasons = ask_of(backend, [*held.values()], max_tokens=100)
    assert reasons["stop"] > len(held) // 2, reasons
