"""Hostile grammars: what they cost in processor time and memory beside the bundled model.

The suite measures three tokens of each grammar, `make test-full` twelve and of more grammars.
"""

import contextlib
import ctypes
import json
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from app.llm.ebnf.errors import GrammarError
from app.llm.ebnf.grammars import to_ebnf
from app.llm.models import bundled
from app.llm.protocol import Backend, Grammar, JsonSchemaGrammar, RegexGrammar, SamplingParams
from tests.support.backends import change_config, load_bundled, load_local, request
from tests.support.tiny_model import HIDDEN, make_tiny_model, tiny_weights

pytestmark = [
    pytest.mark.model,
    pytest.mark.no_cover,
    pytest.mark.skipif(not bundled.is_fetched(), reason="the bundled model is not fetched"),
]

_TOKENS = 12 if "FULL_SIZE" in os.environ else 3
# Processor seconds. The costliest that are accepted take 1 to compile, and 2 on a busy machine.
_MOST_TO_COMPILE = 15


def of_schema(schema: Any) -> JsonSchemaGrammar:
    """The grammar of a schema."""
    return JsonSchemaGrammar(schema=json.dumps(schema))


def strings_of(pattern: str) -> JsonSchemaGrammar:
    """The grammar of a JSON string with a pattern."""
    return of_schema({"type": "string", "pattern": pattern})


_BACK = {"$ref": "#"}
_AMBIGUOUS = ("(([a-z]{0,20}){0,20})0", "(.{0,5}x?){0,10}", "(([a-z]+ ?)+,?)+0", ".*a.{20}")
_IN_STRINGS = _AMBIGUOUS if "FULL_SIZE" in os.environ else _AMBIGUOUS[-1:]
_GRAMMARS: dict[str, Grammar] = {
    **{pattern: RegexGrammar(pattern) for pattern in _AMBIGUOUS},
    **{f"a string of {pattern}": strings_of(f"^({pattern})$") for pattern in _IN_STRINGS},
    "[a-z]{0,128}": RegexGrammar("[a-z]{0,128}"),
    "69 lengths": of_schema({"anyOf": [{"type": "string", "maxLength": i} for i in range(1, 70)]}),
    "17 long lengths": of_schema(
        {"prefixItems": [{"type": "string", "maxLength": 37 * i} for i in range(1, 18)]}
    ),
    "100 arrays": of_schema(
        {"anyOf": [{"items": {"items": {"type": "string"}}, "maxItems": i} for i in range(2, 102)]}
    ),
    "arrays in arrays": of_schema(
        {"items": {"items": {"items": {}, "maxItems": 100}, "maxItems": 100}, "maxItems": 100}
    ),
    "48 arrays of all": of_schema(
        {"anyOf": [*({"items": _BACK, "maxItems": i} for i in range(2, 50)), {"type": "null"}]}
    ),
    "999 values": of_schema({"enum": ["common beginning " * 3 + str(i) for i in range(999)]}),
    "100 optional": of_schema({"properties": {f"p{i}": {"type": "integer"} for i in range(100)}}),
}


@cache
def plain() -> float:
    """The processor seconds of the bundled model's step without a grammar on OpenVINO."""
    _, taken = steps(load_bundled("auto"), None, seed=1)
    return sum(taken) / len(taken)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Backend]:
    """Loads an engine once: OpenVINO with the bundled model, transformers with its vocabulary.

    The tiny model of transformers costs next to nothing itself, to load and in a step.
    """

    @cache
    def load(engine: str) -> Backend:
        bundled = load_bundled("auto")
        if engine == "auto":
            return bundled
        folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
        (folder / "tokenizer.json").write_text(bundled.info.tokenizer_json, encoding="utf-8")
        # It names a special token that the bundled model's vocabulary does not have.
        (folder / "tokenizer_config.json").unlink()
        tokens = Tokenizer.from_str(bundled.info.tokenizer_json).get_vocab_size()
        change_config(folder, vocab_size=tokens)
        weights = tiny_weights()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = np.resize(weights[name], (tokens, HIDDEN))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return load_local(folder, engine=engine)

    return load


def steps(backend: Backend, grammar: Grammar | None, seed: int) -> tuple[float, list[float]]:
    """The processor seconds of adding an answer, and of each of its steps."""
    sampling = SamplingParams(temperature=1.5, seed=seed)
    asked = request("r", max_tokens=_TOKENS, sampling=sampling)
    start = time.process_time()
    backend.add(msgspec.structs.replace(asked, grammar=grammar))
    added = time.process_time() - start
    taken = []
    while backend.has_work():
        start = time.process_time()
        backend.step()
        taken.append(time.process_time() - start)
    return added, taken


@pytest.mark.parametrize("name", _GRAMMARS)
@pytest.mark.parametrize("engine", ["auto", "transformers"], ids=["openvino", "transformers"])
def test_a_hostile_grammar_costs_a_token_no_more_than_the_model(
    engines: Callable[[str], Backend], engine: str, name: str
) -> None:
    """On average a token costs less than ten plain ones, and compiling is bounded."""
    added, taken = steps(engines(engine), _GRAMMARS[name], seed=1)
    assert added < _MOST_TO_COMPILE
    assert sum(taken) / len(taken) < 10 * plain()


def test_what_would_cost_more_is_refused() -> None:
    """Neither engine sees grammars whose answers can go on in very many ways."""
    like: list[Any] = [{"items": {"const": i}, "maxItems": i} for i in range(1, 190)]
    for grammar in (
        RegexGrammar("((a?){50}){50}"),
        strings_of("^([a-z]*a[a-z]{20}|[a-z]{3}){1,6}$"),
        of_schema({"anyOf": like}),
        of_schema({"anyOf": [{"items": _BACK, "title": str(i)} for i in range(60)]}),
        of_schema({"anyOf": [{"pattern": f"^=*{i}$"} for i in range(300)]}),
    ):
        start = time.process_time()
        with pytest.raises(GrammarError):
            to_ebnf(grammar, None)
        assert time.process_time() - start < 2


def _memory() -> int:
    """The memory of this process in bytes, without what the C library keeps for later."""
    with contextlib.suppress(AttributeError):
        # C libraries other than glibc do not have it.
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells memory there")
def test_kept_grammars_are_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate of a grammar's size holds, and where it does not fit, others are dropped."""
    backend = load_bundled("auto")

    def compile_one(number: int) -> None:
        # Five megabytes each, by the estimate.
        parts = {
            f"p{j}": {"items": {"const": 100 * number + j}, "maxItems": 1000} for j in range(10)
        }
        grammar = of_schema({"type": "object", "properties": parts})
        backend.add(msgspec.structs.replace(request("r"), grammar=grammar))
        backend.cancel("r")
        while backend.has_work():
            backend.step()

    kept_bytes = 10 * 2**20
    monkeypatch.setattr("app.llm.engine.openvino.grammars.KEPT_BYTES", kept_bytes)
    compile_one(0)
    before = _memory()
    sizes = []
    for number in range(1, 7):
        compile_one(number)
        sizes.append(_memory() - before)
    assert max(sizes) < kept_bytes
