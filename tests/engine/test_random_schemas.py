"""Random schemas and a real model: each complete answer matches its schema.

`make schemas` runs 200 on each engine and prints how many answers were complete.
"""

import os
import sys

import pytest

from app.llm.models import bundled
from tests.support.backends import load_bundled
from tests.support.structured import ask_for_schemas

_COUNT = int(os.environ.get("SCHEMAS", "0"))
# The suite asks openvino alone: on a CPU transformers takes about ten times as long.
_FEW = {"openvino": (4, 32), "transformers": (3, 32)}
_MANY_TOKENS = 200


@pytest.mark.no_cover
@pytest.mark.model
@pytest.mark.parametrize(
    "engine", ["openvino", pytest.param("transformers", marks=pytest.mark.full_size)]
)
def test_complete_answers_match_their_schemas(engine: str) -> None:
    """Of 32 answers at once, half of them sampled, each complete one matches its schema."""
    if not bundled.is_fetched():
        pytest.skip("the bundled model is not here; `make model` fetches it")
    backend = load_bundled(engine)
    count, max_tokens = (_COUNT, _MANY_TOKENS) if _COUNT else _FEW[engine]
    reasons = ask_for_schemas(backend, count, max_tokens=max_tokens, described=bool(_COUNT))
    sys.stdout.write(
        f"{engine}: {reasons['stop']} of {count} answers complete in {max_tokens} tokens\n"
    )
    assert reasons["stop"] > count // 4, reasons
